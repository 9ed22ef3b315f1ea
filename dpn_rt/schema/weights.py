"""Shape and dtype of stored weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class WeightSpec:
    """Shape and dtype of one canonical weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fused_rows: tuple[int, ...] = field(default=(), compare=False)
    """Rows of each published weight that this one holds, one below the other; empty: it holds one."""
    least_bits: int | None = field(default=None, compare=False)
    """Bits that the matrix of a linear layer may be quantised to, at least; None: it stays in its dtype."""
    kept_by_int8: bool = field(default=False, compare=False)
    """Whether it stays in its dtype where others have 8 bits: engines in 4 bits alone quantise it."""

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def parts(self) -> list[tuple[int, ...]]:
        """Shape of each published weight that this one holds."""
        return [(rows, *self.shape[1:]) for rows in self.fused_rows or self.shape[:1]]


NamedSpecs = Iterator[tuple[str, WeightSpec]]
"""Canonical names with their specs, in the order of the file."""
