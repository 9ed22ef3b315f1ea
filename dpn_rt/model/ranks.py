"""Layers whose weights are split over the ranks of an engine, and what the ranks must be able to do together.

Column-parallel layers (queries, keys and values; gate and up) need nothing of this: each rank has some of their
outputs. Row-parallel ones, which come after, bring the ranks together again, in one of two ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class RankGroup(Protocol):
    """The ranks that share one decoder. All of them make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """Of this process, from 0."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, in its memory; the same bits on every rank."""

    def join(self, x: Tensor) -> Tensor:
        """`[num_rows, columns]` of each rank side by side, in the order of ranks: `[num_rows, size * columns]`."""


Product = Callable[[Tensor], Tensor]
"""`[num_rows, in_features]` -> `[num_rows, out_features]`."""


def summed(linear: Product, group: RankGroup) -> Product:
    """A row-parallel layer: each rank has some columns of its matrix, multiplies its part of `x`, and all sum up."""
    return lambda x: group.sum(linear(x))


def joined(linear: Product, group: RankGroup) -> Product:
    """The same for a matrix in 8 or 4 bits: each rank has some of its rows; parts of `x` are joined, then the results.

    Such products round a row of `x` by its largest value, which no rank's part tells. So every rank takes the whole
    row, and the result has the same bits as without ranks. It moves more than a sum: `x` besides the result.
    """
    return lambda x: group.join(linear(group.join(x)))
