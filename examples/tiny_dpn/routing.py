"""How the routers of the DPN variant learn.

Published: the drawn expert's probability scales the pooled rows, which carries the language loss's gradient to the
router, and the routing loss asks for compression.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from dpn_rt.reference import BoundaryRecord, PyramidTrace, routing_loss

WRONG = 1.0
"""Nats from which on an answer is as wrong as can be. Without a bound the first answers that a pooled picture spoils
push the routers so far that nothing brings them back."""


def policy_loss(losses: torch.Tensor, records: Sequence[tuple[BoundaryRecord, ...]], draws: int) -> torch.Tensor:
    """Score-function gradient: routes that made the answer likelier than the question's other draws get likelier.

    Args:
        losses: [questions * draws] float32, the draws of a question next to each other.
        records: what each boundary did, in the same order.
        draws: routes per question, at least 2.

    Returns:
        a scalar whose gradient reaches the routers alone.
    """
    value = losses.detach().clamp(max=WRONG).view(-1, draws)
    baseline = (value.sum(1, keepdim=True) - value) / (draws - 1)
    advantage = (value - baseline).flatten()
    return (advantage * torch.stack([_log_probability(record) for record in records])).mean()


def _log_probability(records: Sequence[BoundaryRecord]) -> torch.Tensor:
    terms = [record.probs[record.expert].log() for record in records if record.probs is not None]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def evenness_loss(records: Sequence[tuple[BoundaryRecord, ...]]) -> torch.Tensor:
    """Cross entropy of the experts' probabilities with even ones: unlike entropy it pulls even where one is near 1.

    An expert that is never drawn is never learned to live with, and its rows are scaled by its probability: near 0 it
    could not show that it has become good enough.
    """
    logs = [record.probs.log().mean() for item in records for record in item if record.probs is not None]
    return -torch.stack(logs).mean() if logs else torch.zeros(())


def compression_loss(
    records: Sequence[tuple[BoundaryRecord, ...]], target: float, score: Literal["best", "expected"]
) -> torch.Tensor:
    """The routing loss: per boundary max(0, target - mean score of the samples), then the mean over boundaries.

    Args:
        records: what each boundary did, one entry per sequence.
        target: hinge.
        score: "best": rank by compression of the most probable expert times its probability (published); "expected":
            the same of all experts, which also moves a router that prefers to keep every token.
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
