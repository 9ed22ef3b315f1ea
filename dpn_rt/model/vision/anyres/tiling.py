"""The arithmetic of images in tiles, as LLaVA-NeXT and LLaVA-OneVision do it: pixels to tiles, tiles to rows."""

from __future__ import annotations

import math

import numpy as np

from dpn_rt.model.reduction.grid import Grid, IntArray, Segments, num_visual
from dpn_rt.model.vision.visual_input import Tiling

MUCH_LARGER = 1.1
"""A grid is scaled down where its sides are more than so many times those of the largest one allowed."""


def tiling_of(size: Grid, resolution: Grid, side: int, grid: Grid) -> Tiling:
    """How tiles cover an image.

    Args:
        size: height and width of the image in pixels.
        resolution: height and width in pixels of all tiles together, a multiple of `side`.
        side: pixels of a tile.
        grid: rows and columns of visual tokens of a tile.
    """
    tiles = resolution[0] // side, resolution[1] // side
    return Tiling(tiles, _unpadded(size, (tiles[0] * grid[0], tiles[1] * grid[1])))


def _unpadded(size: Grid, covered: Grid) -> Grid:
    """Rows and columns of visual tokens without those of the padding on both sides of the image."""
    height, width = covered
    # Rounded to 7 digits, as transformers does: a product a hair below a whole number counts as this number.
    if size[1] / size[0] > width / height:
        inner = int(round(size[0] * (width / size[1]), 7))
        return height - 2 * ((height - inner) // 2), width
    inner = int(round(size[1] * (height / size[0]), 7))
    return height, width - 2 * ((width - inner) // 2)


def tiled_segments(tiling: Tiling, grid: Grid, max_tiles: int | None) -> Segments:
    """Grids of an image's visual tokens: of its overview, and of all tiles together.

    Args:
        tiling: of the image.
        grid: of one crop.
        max_tiles: a grid much larger than that of so many tiles is scaled down to it; None: none is.
    """
    height, width = tiling.unpadded
    if max_tiles is None:
        return grid, (height, width)
    ratio = math.sqrt(height * width / (max_tiles * grid[0] ** 2))
    if ratio <= MUCH_LARGER:
        return grid, (height, width)
    return grid, (int(height // ratio), int(width // ratio))


def newline_rows(segments: Segments) -> IntArray:
    """Rows of an image that are newlines: one after each row of the tiles' grid, or one at the end without tiles."""
    if len(segments) == 1:
        return np.array([num_visual(segments)], dtype=np.int32)
    overview, (height, width) = segments
    first = num_visual((overview,)) + width
    return (first + np.arange(height) * (width + 1)).astype(np.int32)
