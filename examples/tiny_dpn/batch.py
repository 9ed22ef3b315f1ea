"""Forward and loss of many samples together, on the modules of `dpn_rt.reference`.

The published code runs one sample at a time. Here the layers run over a batch of samples that are padded at their
end, where causal attention does not look. Routing and pooling are those of `dpn_rt.reference.Boundary`, one sample at
a time.

The questions about one picture share the rows of template and image while these do not depend on the question: in the
first stage, and in all stages of a model without routers. A sequence then holds template and image once, and after them
every question as if it were the only one, with its own positions and attention. The first router splits the questions
into sequences of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from dpn_rt.reference import Boundary, BoundaryRecord, EagerDpn, SampleLayout
from examples.tiny_dpn.encoding import Scene, Turn
from examples.tiny_dpn.tokenizer import ROUTER

PADDING_LIMIT = 1.3
"""Samples run together while the longest has at most this many times the rows of the shortest."""


@dataclass(frozen=True, eq=False)
class BatchOutput:
    """Losses of a batch, one entry per question and draw; the draws of one question stand next to each other."""

    losses: torch.Tensor
    """[num_questions] float32: negative log-likelihood of the answer, summed over its tokens."""
    num_tokens: torch.Tensor
    """[num_questions] float32: tokens of the answer."""
    is_right: torch.Tensor
    """[num_questions] bool: whether greedy decoding gives the answer (each of its tokens is the most probable)."""
    records: list[tuple[BoundaryRecord, ...]]
    """What each boundary did. A model without routers has one entry per scene."""
    visual_tokens: list[int]
    """Visual rows in the last stage. A model without routers has one entry per scene."""
    router_rows: tuple[torch.Tensor, ...] = ()
    """[num_questions, hidden] per layer of `read_after`: the `<ROUTER>` rows after that layer."""
    early_rows: torch.Tensor | None = None
    """[num_answer_tokens, hidden]: the rows that predict the answers, after the last layer of `read_after`."""
    targets: torch.Tensor | None = None
    """[num_answer_tokens] int64: the tokens that these rows predict."""


def encode_images(model: EagerDpn, scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the tower `[scenes, visual, tower hidden]`, and the same rows projected `[scenes, visual, hidden]`."""
    assert model.vision is not None and model.projector is not None
    pixels = torch.stack([scene.pixels for scene in scenes]).to(model.device)
    features = model.vision(pixels).last_hidden_state[:, 1:]
    return features, model.projector(features)


def forward(
    model: EagerDpn,
    visual: Sequence[torch.Tensor],
    before_image: Sequence[int],
    scenes: Sequence[Scene],
    draws: int = 1,
    read_after: Collection[int] = (),
) -> BatchOutput:
    """Ask every scene its questions.

    Args:
        model: draws experts in training mode, chooses the most probable ones in eval mode.
        visual: projected rows `[visual, hidden]` of each scene; a model without boundaries takes any number of rows.
        before_image: ids of the template before the image.
        scenes: pictures with their questions.
        draws: routes drawn for each question by a model with routers.
        read_after: layers after which the `<ROUTER>` rows are returned; after the last one the answers' rows too.
    """
    states = [_start(model, visual[i], before_image, scene.turns) for i, scene in enumerate(scenes)]
    router_rows, early_rows = [], None
    for stage, layers in enumerate(model.stages):
        for part in _cut(layers, read_after):
            _run_layers(model, part, states)
            if part[-1] in read_after:
                router_rows.append(torch.cat([state.rows[state.router_rows()] for state in states]))
                if part[-1] == max(read_after):
                    early_rows = _answer_rows(states)
        if stage < len(model.boundaries):
            boundary = cast(Boundary, model.boundaries[stage])
            if stage == 0 and boundary.router is not None:
                states = [single for state in states for single in state.split(draws)]
            for state in states:
                state.cross(boundary)
    return BatchOutput(
        *_losses(model, states),
        records=[tuple(state.records) for state in states],
        visual_tokens=[state.layout.num_visual for state in states],
        router_rows=tuple(router_rows),
        early_rows=early_rows,
        targets=torch.tensor(_targets(states), device=visual[0].device),
    )


class _State:
    """One sequence between stages: template, image, and one or more questions with their answers."""

    def __init__(self, rows: torch.Tensor, layout: SampleLayout, turns: tuple[Turn, ...]) -> None:
        self.rows = rows
        self.layout = layout
        self.turns = turns
        self.records: list[BoundaryRecord] = []

    def split(self, draws: int) -> Iterator[_State]:
        """Split into one sequence per question and draw."""
        start = end = self.layout.image_end
        for turn in self.turns:
            begin, end = end, end + len(turn.ids)
            rows = torch.cat((self.rows[:start], self.rows[begin:end]))
            router_rows = (start + turn.ids.index(ROUTER),)
            layout = SampleLayout(len(rows), self.layout.image_start, self.layout.grid, router_rows)
            for _ in range(draws):
                yield _State(rows, layout, (turn,))

    def cross(self, boundary: Boundary) -> None:
        self.rows, self.layout, record = boundary(self.rows, self.layout)
        self.records.append(record)

    def turn_of_row(self) -> torch.Tensor:
        """[num_rows]: 0 for template and image, 1, 2, ... for the questions."""
        lengths = torch.tensor([self.layout.image_end, *(len(turn.ids) for turn in self.turns)])
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def positions(self) -> torch.Tensor:
        """[num_rows]: every question starts right after the image."""
        end = self.layout.image_end
        return torch.cat([torch.arange(end), *(torch.arange(end, end + len(turn.ids)) for turn in self.turns)])

    def router_rows(self) -> list[int]:
        """Index of the `<ROUTER>` row of every question."""
        ends = accumulate((len(turn.ids) for turn in self.turns), initial=self.layout.image_end)
        return [end + turn.ids.index(ROUTER) for end, turn in zip(ends, self.turns, strict=False)]


def _start(model: EagerDpn, visual: torch.Tensor, before_image: Sequence[int], turns: tuple[Turn, ...]) -> _State:
    ids = [*before_image, *(token for turn in turns for token in turn.ids)]
    text = model.language_model.embed_tokens(torch.tensor(ids, device=model.device))
    start = len(before_image)
    rows = torch.cat((text[:start], visual.to(text.dtype), text[start:]))
    whole = model.config.vision
    grid = whole.grid if whole is not None and whole.num_visual_tokens == len(visual) else (1, len(visual))
    return _State(rows, SampleLayout(len(rows), start, grid, ()), turns)


def _cut(layers: range, after: Collection[int]) -> Iterator[range]:
    start = layers.start
    for layer in layers:
        if layer in after or layer == layers[-1]:
            yield range(start, layer + 1)
            start = layer + 1


def _run_layers(model: EagerDpn, layers: range, states: Sequence[_State]) -> None:
    decoder = model.language_model
    for group in _groups(states):
        rows = pad_sequence([state.rows for state in group], batch_first=True)
        positions = pad_sequence([state.positions() for state in group], batch_first=True).to(rows.device)
        options: dict[str, Any] = {
            "attention_mask": _mask(group, rows.shape[1]),
            "shared_rows": min(state.layout.image_end for state in group),
            "position_ids": positions,
            "position_embeddings": decoder.rotary_emb(rows, position_ids=positions),
        }
        for layer in layers:
            rows = decoder.layers[layer](rows, use_cache=False, **options)
        for state, result in zip(group, rows, strict=True):
            state.rows = result[: state.layout.num_rows]


def _groups(states: Sequence[_State]) -> Iterator[list[_State]]:
    """Group sequences of similar length."""
    group: list[_State] = []
    for state in sorted(states, key=lambda state: state.layout.num_rows):
        if group and state.layout.num_rows > PADDING_LIMIT * group[0].layout.num_rows:
            yield group
            group = []
        group.append(state)
    yield group


def _mask(group: Sequence[_State], num_rows: int) -> torch.Tensor | None:
    """[group, 1, rows, rows] bool; None (plain causal attention) where every sequence has one question."""
    if all(len(state.turns) == 1 for state in group):
        return None
    turns = pad_sequence([state.turn_of_row() for state in group], batch_first=True, padding_value=-1)
    same = (turns[:, :, None] == turns[:, None, :]) | (turns[:, None, :] == 0)
    causal = torch.ones(num_rows, num_rows, dtype=torch.bool).tril()
    return (same & causal)[:, None].to(group[0].rows.device)


def _losses(model: EagerDpn, states: Sequence[_State]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = model.lm_head(model.language_model.norm(_answer_rows(states)))
    target = torch.tensor(_targets(states), device=logits.device)
    nll = F.cross_entropy(logits.float(), target, reduction="none")
    counts = [len(turn.ids) - turn.answer_start for state in states for turn in state.turns]
    num_tokens = torch.tensor(counts, device=nll.device)
    question = torch.repeat_interleave(torch.arange(len(counts), device=nll.device), num_tokens)
    losses = nll.new_zeros(len(counts)).index_add(0, question, nll)
    num_wrong = nll.new_zeros(len(counts)).index_add(0, question, (logits.argmax(-1) != target).float())
    return losses, num_tokens.float(), num_wrong == 0


def _answer_rows(states: Sequence[_State]) -> torch.Tensor:
    """[num_answer_tokens, hidden]: for each token of the answers the row before it, which predicts it."""
    rows = []
    for state in states:
        start = state.layout.image_end
        for turn in state.turns:
            first = start + turn.answer_start - 1
            rows.append(state.rows[first : first + len(turn.ids) - turn.answer_start])
            start += len(turn.ids)
    return torch.cat(rows)


def _targets(states: Sequence[_State]) -> list[int]:
    return [token for state in states for turn in state.turns for token in turn.ids[turn.answer_start :]]
