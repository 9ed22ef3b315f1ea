"""Results of the eager model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dpn_rt.reference.trace import PyramidTrace


@dataclass(frozen=True, slots=True)
class EagerOutput:
    """One forward pass over one sample."""

    logits: torch.Tensor
    """[rows of the last stage, vocab_size]."""
    trace: PyramidTrace
    loss: torch.Tensor | None = None
    """language_loss + routing_loss_weight * routing_loss; None without labels."""
    language_loss: torch.Tensor | None = None
    routing_loss: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class EagerGeneration:
    """Greedy generation for one sample."""

    token_ids: list[int]
    logits: torch.Tensor
    """[len(token_ids), vocab_size]; each token is the argmax of its row."""
    trace: PyramidTrace
    kv_lengths: tuple[int, ...]
    """Rows in every layer's cache at the end, one entry per layer."""
