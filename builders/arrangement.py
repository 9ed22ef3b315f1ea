"""How the numbers of a published tensor are arranged in an engine."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Arrangement = Literal["rows", "taps", "pixels", "positions"]
"""
"rows": flattened to two dimensions if there are more.
"taps": a depthwise convolution `[channels, 1, kh, kw]` becomes `[kh * kw, channels]`.
"pixels": a convolution `[out, in, kh, kw]` becomes `[out, kh * kw * in]`, all channels of a pixel side by side.
"positions": CLIP's position embeddings `[1 + n * n, size]` without the first, resized to another square grid.
"""


def arranged(tensor: Tensor, arrangement: Arrangement, shape: tuple[int, ...]) -> Tensor:
    """A published tensor as an engine has it.

    Args:
        shape: of the engine's tensor; of "rows", only its number of dimensions is read.
    """
    if arrangement == "taps":
        return tensor.flatten(1).t()
    if arrangement == "pixels":
        return tensor.permute(0, 2, 3, 1).flatten(1)
    if arrangement == "positions":
        return resized_positions(tensor[1:], math.isqrt(shape[0]))
    return tensor.flatten(1) if len(shape) == 2 else tensor


def resized_positions(positions: Tensor, side: int) -> Tensor:
    """Embeddings of a square grid's positions, for another side: bicubic with a = -0.5 and antialiasing, in float32.

    Args:
        positions: `[n * n, size]`.
        side: rows and columns wanted.

    Returns:
        `[side * side, size]`.
    """
    old = math.isqrt(positions.shape[0])
    if old == side:
        return positions
    grid = positions.to(torch.float32).view(1, old, old, -1).permute(0, 3, 1, 2)
    resized = functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False, antialias=True)
    return resized[0].flatten(1).t()
