"""Random weights in 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt import ops
from dpn_rt.model.weights.tiles import GROUP, pack_int4, pack_int8
from tests.ops.conftest import Reference
from tests.ops.quantized_reference import int4_reference, int8_reference


def random_int8(generator: torch.Generator, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Integers `[out_features, in_features]` and scales `[out_features]`."""
    q = torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    return q, torch.rand(out_features, generator=generator) * 0.02 + 1e-4


def random_int4(generator: torch.Generator, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Integers `[out_features, in_features]` and scales `[out_features, groups]`, of both signs."""
    q = torch.randint(-8, 8, (out_features, in_features), generator=generator, dtype=torch.int8)
    groups = -(-in_features // GROUP)
    return q, (torch.randn(out_features, groups, generator=generator) * 0.1).bfloat16()


def tiled_scale(scale: Tensor) -> Tensor:
    """`[out_features, groups]` -> `[panels, groups, 16]`, with NaN for rows that are none."""
    padded = functional.pad(scale, (0, 0, 0, -scale.shape[0] % 16), value=float("nan"))
    return padded.view(padded.shape[0] // 16, 16, padded.shape[1]).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class QuantizedCase:
    """A random weight: its kernel, and its reference bit by bit without an activation; both take rows and a bias."""

    kernel: Callable[..., Tensor]
    reference: Reference

    @classmethod
    def of(cls, generator: torch.Generator, bits: int, out_features: int, in_features: int) -> QuantizedCase:
        if bits == 8:
            q, scale = random_int8(generator, out_features, in_features)
            kernel = partial(ops.linear_int8, weight=pack_int8(q), scale=scale)
            return cls(kernel, partial(int8_reference, q=q, scale=scale))
        q, scale = random_int4(generator, out_features, in_features)
        kernel = partial(ops.linear_int4, weight=pack_int4(q), scale=tiled_scale(scale))
        return cls(kernel, partial(int4_reference, q=q, scale=scale))
