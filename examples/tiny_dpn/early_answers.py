"""Extra losses that prepare the dense base for routers.

A pretrained decoder knows the context of every row after a few layers, and reads most of what it needs from an image in
the first half of its layers. A small decoder that is trained from scratch on answers alone learns neither. Its
`<ROUTER>` rows after the first layer differ between questions by one part in ten thousand, so that no router can tell
questions apart; and what it reads from the image in its last layers is lost when routers pool before them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class EarlyAnswers(nn.Module):
    """Predicts answers from the rows after some layers; dropped after training."""

    def __init__(self, num_layers: int, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.guesses = nn.ModuleList(_guess(hidden_size, vocab_size) for _ in range(num_layers))
        self.answer = _guess(hidden_size, vocab_size)

    def loss(self, router_rows: Sequence[torch.Tensor], first_tokens: torch.Tensor) -> torch.Tensor:
        """Cross entropy of the answer's first token, predicted from the `<ROUTER>` row; mean over questions and layers.

        Args:
            router_rows: `[num_questions, hidden]` per layer.
            first_tokens: [num_questions] int64, the first token of each answer.
        """
        pairs = zip(self.guesses, router_rows, strict=True)
        losses = [F.cross_entropy(guess(rows).float(), first_tokens) for guess, rows in pairs]
        return torch.stack(losses).mean()

    def answer_loss(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross entropy of the answers' tokens, predicted from early versions of the rows that predict them at the end.

        Args:
            rows: `[num_tokens, hidden]`.
            targets: `[num_tokens]` int64.
        """
        return F.cross_entropy(self.answer(rows).float(), targets)


def _guess(hidden_size: int, vocab_size: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, vocab_size))
