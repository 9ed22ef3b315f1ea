"""The tokens that a random draw may give: those of `sampling.filters` with every border moved a little either way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpn_rt.sampling.filters import apply_min_p, apply_top_k_top_p, draw, uniforms

HAIR = 1e-6
"""Relative shift of a border. Rounding of sums may put a token on the other side of it."""


@dataclass(frozen=True)
class Parameters:
    """Parameters of `num_rows` rows, as `ops.sample` takes them."""

    temperatures: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    keys: Tensor
    positions: Tensor

    @classmethod
    def random(cls, generator: torch.Generator, num_rows: int, vocab_size: int) -> Parameters:
        """Every filter on in some rows and off in others."""

        def numbers() -> Tensor:
            return torch.rand(num_rows, generator=generator, device=generator.device)

        top_k = (numbers() * 2 * min(vocab_size, 60) - min(vocab_size, 60)).int().clamp(min=-1)
        return cls(
            temperatures=0.2 + 2 * numbers(),
            top_k=top_k,
            top_p=torch.where(numbers() < 0.5, 1.0, (0.01 + 0.99 * numbers()).double()),
            min_p=torch.where(numbers() < 0.5, 0.0, 0.2 * numbers()),
            keys=torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator, device=generator.device),
            positions=(numbers() * 100).long(),
        )

    def tensors(self) -> list[Tensor]:
        return [self.temperatures, self.top_k, self.top_p, self.min_p, self.keys, self.positions]


def uniform_numbers(parameters: Parameters) -> Tensor:
    keys = parameters.keys.cpu().numpy().view(np.uint64)
    return torch.from_numpy(uniforms(keys, parameters.positions.cpu().numpy().astype(np.uint64)))


def tokens_drawn(logits: Tensor, parameters: Parameters, numbers: Tensor, top_p: Tensor) -> Tensor:
    """`[num_rows]` tokens, computed on the CPU in the order of operations of `dpn_rt.sampling.sampler`."""
    logits, vocab_size = logits.cpu().float(), logits.shape[1]
    scaled = (logits - logits.amax(dim=1, keepdim=True)) / parameters.temperatures.cpu()[:, None]
    scaled = apply_min_p(scaled, parameters.min_p.cpu()[:, None])
    top_k = parameters.top_k.cpu().long()
    top_k = torch.where(top_k > 0, top_k.clamp(max=vocab_size), vocab_size)[:, None]
    return draw(apply_top_k_top_p(scaled, top_k, top_p[:, None], int(top_k.max())), numbers)


def assert_drawn(tokens: Tensor, logits: Tensor, parameters: Parameters) -> None:
    """Assert that every row's token is the reference's, or the reference's with slightly moved borders."""
    numbers, top_p = uniform_numbers(parameters), parameters.top_p.cpu()
    variants = [
        tokens_drawn(
            logits,
            parameters,
            (numbers + a * HAIR).clamp(0, 1 - 2**-53),
            torch.where(top_p < 1, (top_p + b * HAIR).clamp(1e-9, 1 - 1e-9), top_p),
        )
        for a in (0, -1, 1)
        for b in (0, -1, 1)
    ]
    allowed = torch.stack(variants, dim=1)
    found = (tokens.cpu().long()[:, None] == allowed).any(1)
    wrong = (~found).nonzero()[:, 0].tolist()
    rows = [f"row {row}: got {tokens[row].item()}, expected one of {set(allowed[row].tolist())}" for row in wrong]
    assert not rows, rows[0]
