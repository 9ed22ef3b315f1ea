"""Packs several arrays into one block of bytes, so that one transfer sends them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

ALIGNMENT = 256
"""Bytes. TensorRT needs this alignment of every address; the kernels load 16 bytes at once."""


@dataclass(frozen=True)
class Packing:
    """Shapes, dtypes and offsets of arrays in a block."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    offsets: tuple[int, ...]
    """Start of each array, in bytes."""
    num_bytes: int
    """Size of the block."""

    @classmethod
    def of(cls, arrays: Sequence[Array]) -> Packing:
        """The packing of arrays with the shapes and dtypes of `arrays`."""
        return cls.of_shapes([(array.shape, torch.from_numpy(np.empty(0, array.dtype)).dtype) for array in arrays])

    @classmethod
    def of_shapes(cls, shapes: Sequence[tuple[Sequence[int], torch.dtype]]) -> Packing:
        """The packing of arrays with these shapes and dtypes."""
        offsets, end = [], 0
        for shape, dtype in shapes:
            offsets.append(end)
            end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return cls(tuple(tuple(shape) for shape, _ in shapes), tuple(dtype for _, dtype in shapes), tuple(offsets), end)

    def views(self, block: Tensor) -> list[Tensor]:
        """One tensor per array, a view of `block` `[num_bytes]` uint8."""
        return [
            block[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for offset, shape, dtype in zip(self.offsets, self.shapes, self.dtypes, strict=True)
        ]

    def fill(self, block: Tensor, arrays: Sequence[Array]) -> None:
        """Copies the arrays into `block` `[num_bytes]` uint8, which is in the host's memory.

        Raises:
            ValueError: an array has another shape than in this packing.
        """
        for view, array in zip(self.views(block), arrays, strict=True):
            if view.shape != array.shape:
                raise ValueError(f"an array has shape {list(array.shape)}, its place {list(view.shape)}")
            view.numpy()[...] = array
