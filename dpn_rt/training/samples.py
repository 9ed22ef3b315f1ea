"""Conversations -> token ids, labels and pixels, by the prompt code that the engine uses for requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.data import Dataset

from dpn_rt.errors import RequestError, TrainingError
from dpn_rt.prompts.messages import Message
from dpn_rt.prompts.processor import Processor
from dpn_rt.reference.training import IGNORE_LABEL
from dpn_rt.training.rows import Conversation

Sample = dict[str, torch.Tensor]
"""`input_ids` [num_ids] int64, with one id -200 for the image; `labels` [num_ids] int64, -100 but for the assistant's
answers and the end token after each; `pixel_values` [3, side, side] float32, absent without an image."""


def make_sample(conversation: Conversation, processor: Processor, max_rows: int) -> Sample:
    """What a model learns from a conversation.

    Args:
        conversation: checked.
        processor: of the model.
        max_rows: ids after so many rows, visual ones among them, are cut off.

    Raises:
        TrainingError: the image cannot be read, or no answer begins within `max_rows`.
    """
    sample: Sample = {}
    messages = conversation.messages()
    try:
        ids, labels = labelled_ids(messages, processor)
        num_visual, num_ids = 1, max_rows
        if conversation.image is not None:
            image = processor.image(conversation.image)
            sample["pixel_values"] = image.views[0]
            num_visual, num_ids = image.num_rows, max(max_rows + 1 - image.num_rows, 0)
    except RequestError as error:
        raise TrainingError(f"{conversation.place}: {error}") from error
    sample["input_ids"] = torch.tensor(ids[:num_ids])
    sample["labels"] = torch.tensor(labels[:num_ids])
    if not bool((sample["labels"] != IGNORE_LABEL).any()):
        first = next(i for i, label in enumerate(labels) if label != IGNORE_LABEL) + num_visual - 1
        raise TrainingError(
            f"{conversation.place}: its first answer begins after {first} rows, expected fewer than {max_rows} "
            "(--max-length)"
        )
    return sample


def labelled_ids(messages: Sequence[Message], processor: Processor) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels: -100 but for the assistant's answers and the end token after each.

    Args:
        messages: of user and assistant in turns.
        processor: of the model.

    Raises:
        RequestError: see `Processor.chat`.
    """

    def ids_of(count: int, asks: bool) -> list[int]:
        prompt = processor.chat(messages[:count], add_generation_prompt=asks)
        found: list[int] = prompt["prompt_token_ids"]
        return found

    ids = ids_of(len(messages), False)
    labels = [IGNORE_LABEL] * len(ids)
    for place in range(1, len(messages), 2):
        start = _num_equal(ids, ids_of(place, True))
        end = _num_equal(ids, ids_of(place + 1, False)) if place + 1 < len(messages) else len(ids)
        labels[start:end] = ids[start:end]
    return ids, labels


def _num_equal(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many ids two prompts have in common at their start."""
    return next(
        (i for i, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other), min(len(ids), len(others))
    )


class Conversations(Dataset[Sample]):
    """The samples of a training set, made when they are asked for."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        processor: Processor,
        max_rows: int,
        skip: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            conversations: checked.
            processor: of the model.
            max_rows: see `make_sample`.
            skip: takes the reason why a conversation has no sample, and the next one stands in for it; None: it is an
                error.
        """
        self._conversations, self._processor, self._max_rows, self._skip = conversations, processor, max_rows, skip

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> Sample:
        """A sample.

        Raises:
            TrainingError: see `make_sample`; with `skip`, no conversation has a sample.
        """
        for step in range(len(self)):
            conversation = self._conversations[(index + step) % len(self)]
            try:
                return make_sample(conversation, self._processor, self._max_rows)
            except TrainingError as error:
                if self._skip is None:
                    raise
                self._skip(str(error))
        raise TrainingError(f"none of {len(self)} conversations has a sample, expected images and answers that fit")
