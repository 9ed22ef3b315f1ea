"""Teaches the base, before there are routers, what these will build on.

In a pretrained decoder every row knows its context after a few layers, and most of what is looked up in an image is
looked up in the first half of them. In one trained from scratch on answers alone nothing asks for either. After the
first layer the rows of `<ROUTER>` of all questions are the same to one part in ten thousand, and no router can tell
questions apart; and what is read in the last layers is lost when routers pool before them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class EarlyAnswers(nn.Module):
    """Guesses answers after some layers; thrown away after training."""

    def __init__(self, num_layers: int, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.guesses = nn.ModuleList(_guess(hidden_size, vocab_size) for _ in range(num_layers))
        self.answer = _guess(hidden_size, vocab_size)

    def loss(self, router_rows: Sequence[torch.Tensor], first_tokens: torch.Tensor) -> torch.Tensor:
        """Of the answer's first token, from the row of `<ROUTER>`: cross entropy, mean over questions and layers.

        Args:
            router_rows: [num_questions, hidden] per layer.
            first_tokens: [num_questions] int64, the first token of each answer.
        """
        pairs = zip(self.guesses, router_rows, strict=True)
        losses = [F.cross_entropy(guess(rows).float(), first_tokens) for guess, rows in pairs]
        return torch.stack(losses).mean()

    def answer_loss(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Of every token of the answers, from the rows [num_tokens, hidden] that predict them at the end too."""
        return F.cross_entropy(self.answer(rows).float(), targets)


def _guess(hidden_size: int, vocab_size: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, vocab_size))
