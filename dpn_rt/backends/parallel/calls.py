"""A call of an executor, as rank 0 sends it: its tensors as one block on their device, the rest as bytes."""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpn_rt.device.packing import ALIGNMENT, Packing


@dataclass(frozen=True)
class Call:
    """What the pipe carries of a call. Pickles are safe there: both ends are the same program."""

    method: str
    arguments: bytes
    """A pickle in which tensors are numbers."""
    packing: Packing
    """Of the tensors, in the block that is broadcast; without bytes there is no broadcast."""

    @classmethod
    def of(cls, method: str, arguments: tuple[Any, ...]) -> tuple[Call, list[Tensor]]:
        """A call, and the tensors of its arguments."""
        buffer = io.BytesIO()
        pickler = _Pickler(buffer)
        pickler.dump(arguments)
        return cls(method, buffer.getvalue(), _packing(pickler.tensors)), pickler.tensors

    def filled_block(self, tensors: list[Tensor]) -> Tensor:
        """`[num_bytes]` uint8 with the tensors in it, where they are."""
        block = self.empty_block(tensors[0].device)
        for view, tensor in zip(self.packing.views(block), tensors, strict=True):
            view.copy_(tensor)
        return block

    def empty_block(self, device: torch.device) -> Tensor:
        """Memory for the block."""
        return torch.empty(self.packing.num_bytes, dtype=torch.uint8, device=device)

    def unpacked(self, block: Tensor) -> tuple[Any, ...]:
        """The arguments, whose tensors are views of the block."""
        arguments: tuple[Any, ...] = _Unpickler(io.BytesIO(self.arguments), self.packing.views(block)).load()
        return arguments


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=5)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: object) -> int | None:
        """The number of a tensor, which goes another way."""
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(buffer)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        """The tensor of a number."""
        return self._tensors[number]


def _packing(tensors: list[Tensor]) -> Packing:
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-math.prod(tensor.shape) * tensor.dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return Packing(
        tuple(tuple(each.shape) for each in tensors), tuple(each.dtype for each in tensors), tuple(offsets), end
    )
