"""Memory for what recorded steps of the host make."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

_LEAST_BYTES = 64


class StepMemory:
    """Gives memory again once no tensor lies in it.

    Graphs that do not run side by side share one, as graphs of a GPU share a pool: each may write over what another has
    returned.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._free: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Of all memory, used or free."""
        return sum(part.nbytes for part in self._parts)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor. Its memory is free again when all tensors in it are gone."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            return torch.empty(shape, dtype=dtype, device="cpu")
        part = self._take(num_bytes)
        # All tensors within a part hold this array, so it lives as long as any of them.
        held = part.numpy()[:num_bytes]
        weakref.finalize(held, self._free.append, part).atexit = False
        return torch.from_numpy(held).view(dtype).view(*shape)

    def alias(self, tensor: Tensor) -> Tensor | None:
        """A tensor at the same place that does not keep its memory from others; None: it does not lie in this memory.

        `tensor`: contiguous.
        """
        for part in self._parts:
            first = tensor.data_ptr() - part.data_ptr()
            if 0 <= first < part.nbytes:
                return part[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return None

    def _take(self, num_bytes: int) -> Tensor:
        """The smallest free part that is large enough, or a new one: sizes are powers of two, to fit more often."""
        fitting = [(len(part), index) for index, part in enumerate(self._free) if len(part) >= num_bytes]
        if fitting:
            return self._free.pop(min(fitting)[1])
        part = torch.empty(max(_LEAST_BYTES, 1 << (num_bytes - 1).bit_length()), dtype=torch.uint8, device="cpu")
        self._parts.append(part)
        return part
