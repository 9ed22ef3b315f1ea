"""A batch of samples through the eager model, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch

from dpn_rt.errors import ImageError, RequestError
from dpn_rt.reference import training
from dpn_rt.reference.outputs import EagerBatchOutput
from dpn_rt.reference.trace import PyramidTrace

if TYPE_CHECKING:
    from dpn_rt.reference.model import EagerDpn


def is_batch(input_ids: torch.Tensor | Sequence[int], attention_mask: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether `EagerDpn.forward` has got a batch: there is a mask, or there are several rows of ids.

    Raises:
        RequestError: there is a mask, but the ids are no tensor.
    """
    if attention_mask is not None and not isinstance(input_ids, torch.Tensor):
        raise RequestError(f"input_ids: expected a tensor with an attention_mask, got {type(input_ids).__name__}")
    if not isinstance(input_ids, torch.Tensor):
        return False
    return attention_mask is not None or (input_ids.dim() == 2 and len(input_ids) > 1)


def refuse_in_batch(**given: object) -> None:
    """Refuse arguments of single samples.

    Raises:
        RequestError: one of them is not None.
    """
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise RequestError(f"{', '.join(wrong)}: got a batch, expected a single sample with it")


def forward_batch(
    model: EagerDpn,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pixel_values: torch.Tensor | Sequence[torch.Tensor | None] | None,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
) -> EagerBatchOutput:
    """Logits of every sample, and the losses of the batch when `labels` are given.

    A batch gives what its samples give alone: each draws its own route, and there is no row for padding. The language
    loss is the mean over all answer tokens of the batch, so a long answer counts for more than a short one; the
    routing loss is that of `training.routing_loss` over all samples.

    Args:
        model: the model.
        input_ids: [num_samples, num_ids], padded on the right.
        attention_mask: [num_samples, num_ids], 1 for ids and 0 for padding; None: there is none.
        pixel_values: [num_samples, 3, side, side], or a list with None for samples without an image.
        labels: [num_samples, num_ids], not shifted; -100 where nothing is to be learned.
        num_items_in_batch: see `EagerDpn.forward`.

    Raises:
        RequestError, ImageError: as `EagerDpn.forward`, or shapes that do not fit each other; messages about one
            sample name it.
    """
    samples = _without_padding(input_ids, attention_mask)
    pictures = _pictures(pixel_values, len(samples))
    if labels is not None and labels.shape != input_ids.shape:
        raise RequestError(f"labels: expected shape {list(input_ids.shape)}, as input_ids, got {list(labels.shape)}")
    logits: list[torch.Tensor] = []
    traces: list[PyramidTrace] = []
    losses: list[torch.Tensor] = []
    for index, (ids, pixels) in enumerate(zip(samples, pictures, strict=True)):
        try:
            embeds, layout = model.embed_sample(ids, pixels)
            hidden, layout, trace = model.prefill(embeds, layout)
        except RequestError as error:
            raise type(error)(f"sample {index}: {error}") from error
        logits.append(model.lm_head(hidden))
        traces.append(trace)
        if labels is not None:
            rows = training.expand_labels(labels[index, : len(ids)].to(model.device), layout)
            losses.append(training.summed_language_loss(logits[-1], rows))
    if labels is None:
        return EagerBatchOutput(tuple(logits), tuple(traces))
    num_tokens = sum(training.num_answer_tokens(row[: len(ids)]) for row, ids in zip(labels, samples, strict=True))
    language = torch.stack(losses).sum() / max(num_tokens, 1)
    routing = training.routing_loss(traces, model.routing_hinge_target).to(language.device)
    loss = training.share_of_step(language + model.routing_loss_weight * routing, num_tokens, num_items_in_batch)
    return EagerBatchOutput(tuple(logits), tuple(traces), loss, language, routing)


def _without_padding(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The ids of each sample [its number of ids]."""
    if input_ids.dim() != 2:
        raise RequestError(f"input_ids: expected a batch [num_samples, num_ids], got shape {list(input_ids.shape)}")
    if attention_mask is None:
        return list(input_ids)
    if attention_mask.shape != input_ids.shape:
        shapes = f"{list(input_ids.shape)}, as input_ids, got {list(attention_mask.shape)}"
        raise RequestError(f"attention_mask: expected shape {shapes}")
    mask = attention_mask.bool()
    for index, row in enumerate(mask):
        if not bool(torch.equal(row, torch.arange(len(row), device=row.device) < row.sum())):
            raise RequestError(f"attention_mask[{index}]: expected padding on the right: ones, and then zeros")
    return [ids[: int(row.sum())] for ids, row in zip(input_ids, mask, strict=True)]


def _pictures(
    pixel_values: torch.Tensor | Sequence[torch.Tensor | None] | None, num_samples: int
) -> list[torch.Tensor | None]:
    """[3, side, side] of each sample; None for one without an image."""
    if pixel_values is None:
        return [None] * num_samples
    if len(pixel_values) != num_samples:
        raise ImageError(f"pixel_values: expected an entry per sample, {num_samples}, got {len(pixel_values)}")
    return list(pixel_values)
