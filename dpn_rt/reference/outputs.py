"""Results of the eager model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from dpn_rt.reference.trace import PyramidTrace


@dataclass(frozen=True)
class EagerOutput:
    """One forward pass over one sample."""

    logits: torch.Tensor
    """[rows of the last stage, vocab_size]."""
    trace: PyramidTrace
    loss: torch.Tensor | None = None
    """language_loss + routing_loss_weight * routing_loss, or its share of an optimiser step (see `EagerDpn.forward`);
    None without labels."""
    language_loss: torch.Tensor | None = None
    routing_loss: torch.Tensor | None = None

    def __getitem__(self, index: int | slice) -> Any:
        """(loss, logits), without labels (logits,): what transformers' models put first, for its Trainer."""
        given = (self.logits,) if self.loss is None else (self.loss, self.logits)
        return given[index]


@dataclass(frozen=True)
class EagerBatchOutput:
    """One forward pass over a batch."""

    logits: tuple[torch.Tensor, ...]
    """Of each sample, [rows of its last stage, vocab_size]."""
    traces: tuple[PyramidTrace, ...]
    """Of each sample."""
    loss: torch.Tensor | None = None
    """language_loss + routing_loss_weight * routing_loss, or its share of an optimiser step (see `EagerDpn.forward`);
    None without labels."""
    language_loss: torch.Tensor | None = None
    """Mean over all answer tokens of the batch."""
    routing_loss: torch.Tensor | None = None
    """Over all samples of the batch."""

    def __getitem__(self, index: int | slice) -> Any:
        """As `EagerOutput`, with logits [num_samples, most rows, vocab_size] that are 0 after a sample's last row."""
        if index == 0 and self.loss is not None:
            return self.loss  # all that training asks for; padded logits would take memory
        padded = pad_sequence(list(self.logits), batch_first=True)
        given = (padded,) if self.loss is None else (self.loss, padded)
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
