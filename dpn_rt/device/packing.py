"""Several arrays in one block of bytes, so that one transfer carries them all."""

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
"""Bytes: of every address that TensorRT takes; the kernels load 16 at once."""


@dataclass(frozen=True)
class Packing:
    """Where arrays of known shapes and dtypes lie in a block."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    offsets: tuple[int, ...]
    """In bytes."""
    num_bytes: int

    @classmethod
    def of(cls, arrays: Sequence[Array]) -> Packing:
        """A block with room for arrays like these."""
        offsets, end = [], 0
        for array in arrays:
            offsets.append(end)
            end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        dtypes = tuple(torch.from_numpy(np.empty(0, array.dtype)).dtype for array in arrays)
        return cls(tuple(array.shape for array in arrays), dtypes, tuple(offsets), end)

    def views(self, block: Tensor) -> list[Tensor]:
        """The arrays' places in `block` `[num_bytes]` uint8, as tensors."""
        return [
            block[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for offset, shape, dtype in zip(self.offsets, self.shapes, self.dtypes, strict=True)
        ]

    def fill(self, block: Tensor, arrays: Sequence[Array]) -> None:
        """Copies the arrays to their places in `block` `[num_bytes]` uint8 in the host's memory.

        Raises:
            ValueError: an array has another shape than its place.
        """
        for view, array in zip(self.views(block), arrays, strict=True):
            if view.shape != array.shape:
                raise ValueError(f"an array has shape {list(array.shape)}, its place {list(view.shape)}")
            view.numpy()[...] = array
