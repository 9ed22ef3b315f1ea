"""Losses of the published recipe. `boundary` draws the experts; the rest of training is an ordinary loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dpn_rt.reference.trace import BoundaryRecord, PyramidTrace, SampleLayout

ROUTING_LOSS_WEIGHT = 0.001
ROUTING_HINGE_TARGET = 1.5
IGNORE_LABEL = -100


def expand_labels(labels: torch.Tensor, layout: SampleLayout) -> torch.Tensor:
    """Labels of a prompt's ids -> labels of its rows; those of visual rows are -100.

    Args:
        labels: [num_ids] int64, one of them for the image's placeholder.
        layout: of the first stage.

    Returns:
        [layout.num_rows] int64.
    """
    if layout.grid is None:
        return labels
    visual = labels.new_full((layout.num_visual,), IGNORE_LABEL)
    return torch.cat((labels[: layout.image_start], visual, labels[layout.image_start + 1 :]))


def language_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token, in float32.

    Args:
        logits: [num_rows, vocab_size].
        labels: [num_rows] int64; rows with -100 do not count.
    """
    return F.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=IGNORE_LABEL)


def summed_language_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As `language_loss`, the sum over rows that count in place of their mean."""
    return F.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=IGNORE_LABEL, reduction="sum")


def num_answer_tokens(labels: torch.Tensor) -> int:
    """How many labels [num_ids] count; the first one does not, since nothing predicts it."""
    return int((labels[1:] != IGNORE_LABEL).sum())


def share_of_step(loss: torch.Tensor, num_tokens: int, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """The loss of a batch as a part of an optimiser step's loss: weighted by its share of the step's answer tokens.

    Args:
        loss: mean over the batch's answer tokens.
        num_tokens: answer tokens of the batch.
        num_items_in_batch: answer tokens of the step; None: the batch is the step.
    """
    return loss if num_items_in_batch is None else loss * (num_tokens / num_items_in_batch)


def routing_loss(traces: Sequence[PyramidTrace], target: float = ROUTING_HINGE_TARGET) -> torch.Tensor:
    """Loss that pushes the routers towards more compression.

    For each boundary: max(0, target - mean), where the mean over samples is of score * probability of the most probable
    expert, and the score is the expert's rank by compression. The loss is the mean over boundaries. The mean over
    samples comes before the hinge, so give all samples of an optimiser step together. Samples that a boundary skipped
    do not count, and neither does a boundary that skipped all samples.

    Args:
        traces: one per sample, from a forward pass with gradient.
        target: of the hinge; a larger one asks for more compression.

    Returns:
        A float32 scalar; 0 without gradient when no router ran.
    """
    if not traces:
        return torch.zeros(())
    hinges = []
    for records in zip(*(trace.records for trace in traces), strict=True):
        terms = [_score(record) for record in records if record.probs is not None]
        if terms:
            hinges.append(torch.clamp(target - torch.stack(terms).mean(), min=0.0))
    return torch.stack(hinges).mean() if hinges else torch.zeros(())


def _score(record: BoundaryRecord) -> torch.Tensor:
    assert record.probs is not None
    best = int(record.probs.argmax())
    return record.scores[best] * record.probs[best]
