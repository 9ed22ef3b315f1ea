"""Teaches the row of `<ROUTER>` in the base, before there are routers, to know what is asked.

In a pretrained decoder every row knows its context after a few layers, and routers can read it. In one trained from
scratch on answers alone nothing asks that of a row that predicts no answer: after the first layer the rows of
`<ROUTER>` of all questions are the same to one part in ten thousand, and no router can tell questions apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class EarlyAnswers(nn.Module):
    """Guesses the answer's first token from the row of `<ROUTER>` after some layers; thrown away after training."""

    def __init__(self, num_layers: int, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.guesses = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, vocab_size)) for _ in range(num_layers)
        )

    def loss(self, rows: Sequence[torch.Tensor], first_tokens: torch.Tensor) -> torch.Tensor:
        """Cross entropy, mean over questions and layers.

        Args:
            rows: [num_questions, hidden] per layer.
            first_tokens: [num_questions] int64, the first token of each answer.
        """
        losses = [
            F.cross_entropy(guess(row).float(), first_tokens) for guess, row in zip(self.guesses, rows, strict=True)
        ]
        return torch.stack(losses).mean()
