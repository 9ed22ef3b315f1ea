"""Results of the eager model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dpn_rt.reference.trace import PyramidTrace


@dataclass(frozen=True)
class EagerOutput:
    """One forward pass over one sample."""

    logits: torch.Tensor
    """[rows of the last stage, vocab_size]."""
    trace: PyramidTrace
    loss: torch.Tensor | None = None
    """language_loss + routing_loss_weight * routing_loss; None without labels."""
    language_loss: torch.Tensor | None = None
    routing_loss: torch.Tensor | None = None

    def __getitem__(self, index: int | slice) -> Any:
        """(loss, logits), without labels (logits,): what transformers' models put first, for its Trainer."""
        given = (self.logits,) if self.loss is None else (self.loss, self.logits)
        return given[index]


@dataclass(frozen=True)
class EagerGeneration:
    """Greedy generation for one sample."""

    token_ids: list[int]
    logits: torch.Tensor
    """[len(token_ids), vocab_size]; each token is the argmax of its row."""
    trace: PyramidTrace
    kv_lengths: tuple[int, ...]
    """Rows in every layer's cache at the end, one entry per layer."""
