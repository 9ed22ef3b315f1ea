"""Losses of the DPN variant's routers.

In the published recipe the drawn expert's probability scales the pooled rows, so that the gradient of the language loss
reaches the router, and the routing loss asks for compression.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from dpn_rt.reference import BoundaryRecord, PyramidTrace, routing_loss

WRONG = 1.0
"""Bound of an answer's loss, in nats. Without it the first answers that pooling spoils push the routers so far that
they never return."""


def policy_loss(losses: torch.Tensor, records: Sequence[tuple[BoundaryRecord, ...]], draws: int) -> torch.Tensor:
    """Score-function gradient: makes a route likelier whose answer was likelier than after the question's other draws.

    Args:
        losses: `[num_questions * draws]` float32; the draws of a question stand next to each other.
        records: what each boundary did, in the same order.
        draws: routes per question, at least 2.

    Returns:
        A scalar whose gradient reaches only the routers.
    """
    value = losses.detach().clamp(max=WRONG).view(-1, draws)
    baseline = (value.sum(1, keepdim=True) - value) / (draws - 1)
    advantage = (value - baseline).flatten()
    return (advantage * torch.stack([_log_probability(record) for record in records])).mean()


def _log_probability(records: Sequence[BoundaryRecord]) -> torch.Tensor:
    terms = [record.probs[record.expert].log() for record in records if record.probs is not None]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def evenness_loss(records: Sequence[tuple[BoundaryRecord, ...]]) -> torch.Tensor:
    """Cross entropy between even probabilities and the experts'. Unlike entropy it pulls even where one is near 1.

    The decoder learns to work with an expert only while it is drawn. And since its probability scales its rows, an
    expert near 0 could not show that it has become good enough.
    """
    logs = [record.probs.log().mean() for item in records for record in item if record.probs is not None]
    return -torch.stack(logs).mean() if logs else torch.zeros(())


def compression_loss(
    records: Sequence[tuple[BoundaryRecord, ...]], target: float, score: Literal["best", "expected"]
) -> torch.Tensor:
    """The routing loss: max(0, target - mean score over samples) per boundary, then the mean over boundaries.

    Args:
        records: what each boundary did, one entry per sequence.
        target: hinge.
        score: an expert's rank by compression times its probability, of the most probable expert ("best", published) or
            summed over all experts ("expected"), which also moves a router that prefers to keep every token.
    """
    if score == "best":
        return routing_loss([PyramidTrace(item, (), (), ()) for item in records], target)
    hinges = []
    for boundary in zip(*records, strict=True):
        probs = [record.probs for record in boundary if record.probs is not None]
        if probs:
            ranks = probs[0].new_tensor(boundary[0].scores)
            hinges.append(torch.clamp(target - (torch.stack(probs) @ ranks).mean(), min=0.0))
    return torch.stack(hinges).mean() if hinges else torch.zeros(())
