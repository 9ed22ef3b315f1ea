"""Grids of visual tokens, and the rule of what a pooling kernel leaves of one."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Grid = tuple[int, int]
"""Rows and columns of visual tokens; (1, n) for n tokens that are no grid."""
Segments = tuple[Grid, ...]
"""Grids of one image's visual tokens, in the order of their rows: one, or those of its overview and of its tiles."""
IntArray = npt.NDArray[np.int32]
Side = TypeVar("Side", int, IntArray)


def pooled_side(side: Side, kernel: Side) -> Side:
    """Visual tokens that are left of one side of a grid: strides equal kernels, and what is left over is dropped.

    The one place in Python that knows this rule; `csrc/ops` has its own for the kernels.
    """
    return side // kernel


def pooled_grids(grids: IntArray, kernels: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """What a kernel leaves of each grid.

    Args:
        grids: `[num_images, 2]` rows and columns.
        kernels: `[num_images, 2]` height and width.

    Returns:
        `[num_images, 2]`, and `[num_images]` whether the kernel fits into the grid.
    """
    after = pooled_side(grids, kernels)
    return after, after.min(axis=-1) > 0


def pooled_grid(grid: Grid, kernel: tuple[int, int]) -> tuple[Grid, bool]:
    """As `pooled_grids`, for one image."""
    after = pooled_side(grid[0], kernel[0]), pooled_side(grid[1], kernel[1])
    return after, min(after) > 0


def num_visual(segments: Segments) -> int:
    """Visual tokens of one image."""
    return sum(height * width for height, width in segments)


def as_grid(segments: Segments) -> Grid:
    """The grid of an image with one segment, else (1, n)."""
    return segments[0] if len(segments) == 1 else (1, num_visual(segments))
