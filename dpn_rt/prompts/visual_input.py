"""The image side of a request: pixels for the vision tower, or embeddings that take its place."""

from __future__ import annotations

import hashlib
import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpn_rt.errors import ImageError
from dpn_rt.format.config import ModelConfig

Grid = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class VisualInput:
    """One image. Exactly one of `pixels` and `embeds` is there."""

    pixels: Tensor | None
    """[3, image_size, image_size] float32."""
    embeds: Tensor | None
    """[num_visual_tokens, hidden_size] float32: rows after the projector."""
    grid: Grid
    """(rows, columns) of the visual tokens."""
    num_visual_tokens: int
    """Rows that replace the placeholder."""
    key: bytes
    """Hash of the content: the same for the same pixels or embeddings on the same grid."""

    @classmethod
    def of(cls, pixels: Tensor | None, embeds: Tensor | None, grid: Grid, num_visual_tokens: int) -> VisualInput:
        """An image with its key."""
        content = embeds if pixels is None else pixels
        assert content is not None
        name = f"{'pixels' if embeds is None else 'embeds'} {grid} {list(content.shape)} ".encode()
        digest = hashlib.blake2b(name, digest_size=32)
        digest.update(content.contiguous().numpy().data)
        return cls(pixels, embeds, grid, num_visual_tokens, digest.digest())

    @property
    def nbytes(self) -> int:
        """Bytes of the content."""
        return sum(content.nbytes for content in (self.pixels, self.embeds) if content is not None)


def from_embeds(embeds: Any, image_grid: Any, model: ModelConfig) -> VisualInput:
    """Checked image embeddings.

    Args:
        embeds: [num_visual_tokens, hidden_size], a floating-point tensor or array.
        image_grid: (rows, columns); None for a square one.
        model: its hidden size, and whether it pools (a dense model takes any number of rows).

    Raises:
        ImageError: wrong type, shape or grid, or a value that is not finite.
    """
    if isinstance(embeds, np.ndarray) and np.issubdtype(embeds.dtype, np.floating):
        embeds = torch.from_numpy(np.array(embeds, dtype=np.float32))
    if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
        kind = f"{embeds.dtype} tensor" if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ImageError(f"image_embeds: expected a floating-point tensor, got {kind}")
    if embeds.layout != torch.strided or embeds.is_meta:
        raise ImageError(f"image_embeds: expected a dense tensor with data, got {embeds.layout} on {embeds.device}")
    hidden_size = model.decoder.hidden_size
    if embeds.ndim != 2 or embeds.shape[1] != hidden_size or embeds.shape[0] == 0:
        raise ImageError(f"image_embeds: expected shape [num_visual_tokens, {hidden_size}], got {list(embeds.shape)}")
    # A copy: the caller may use its memory again while the request waits, or runs anew after a preemption.
    embeds = embeds.detach().resolve_neg().to("cpu", torch.float32, copy=True).contiguous()
    finite = torch.isfinite(embeds).all(dim=1)
    if not bool(finite.all()):
        row = int(torch.nonzero(~finite)[0, 0])
        raise ImageError(f"image_embeds: row {row} has NaN or infinite values, expected finite ones")
    count = embeds.shape[0]
    return VisualInput.of(None, embeds, _grid(image_grid, count, pools=bool(model.reduction.layers)), count)


def check_pixels(image: VisualInput, model: ModelConfig) -> None:
    """Raise ImageError unless an image was made ready for this model's tower."""
    vision = model.vision
    expected = None if vision is None else (3, vision.image_size, vision.image_size)
    if image.pixels is None or expected is None or tuple(image.pixels.shape) != expected:
        got = "embeddings" if image.pixels is None else f"pixels {list(image.pixels.shape)}"
        raise ImageError(f"image: {got}, expected {'none' if expected is None else f'pixels {list(expected)}'}")


def check_image_grid(image_grid: Any, grid: Grid) -> None:
    """Raise ImageError unless a grid that was given with an image is the tower's own."""
    if image_grid is not None and _pair(image_grid) != grid:
        raise ImageError(f"image_grid={image_grid!r}: the vision tower makes {grid} of an image; leave it out")


def _grid(image_grid: Any, count: int, pools: bool) -> Grid:
    if image_grid is not None:
        height, width = _pair(image_grid)
        if height < 1 or width < 1 or height * width != count:
            raise ImageError(
                f"image_grid={image_grid!r} for image_embeds of {count} rows: expected (h, w) with h * w = {count}"
            )
        return height, width
    side = math.isqrt(count)
    if side * side == count:
        return side, side
    if pools:
        raise ImageError(f'image_embeds has {count} rows, which is no square grid: expected "image_grid": (h, w)')
    return 1, count


def _pair(image_grid: Any) -> Grid:
    try:
        height, width = image_grid
        return operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise ImageError(f"image_grid={image_grid!r}: expected (rows, columns), two integers") from None
