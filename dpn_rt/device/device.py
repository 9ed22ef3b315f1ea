"""The interface of a device: memory, transfers and graphs. `host.py` and `cuda.py` implement it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpn_rt.device.packing import Array, Packing
from dpn_rt.device.transfer import upload

Step = Callable[[], tuple[Tensor, ...]]
"""Work on tensors at fixed addresses, without transfers to or from the host."""


class Graph(Protocol):
    """A step that is recorded once and can be repeated with new contents of its inputs."""

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The step's outputs, in memory that every `replay` overwrites."""

    def replay(self) -> None:
        """Queues the step."""


class Readback(Protocol):
    """A tensor on its way to the host."""

    def wait(self) -> Array:
        """Its values, once they have arrived."""


@dataclass(frozen=True)
class Known:
    """A `Readback` of values that the host has."""

    values: Array

    def wait(self) -> Array:
        """The values."""
        return self.values


class Device(ABC):
    """Memory and a queue of work. The device does its work in the order in which it was queued."""

    is_async: bool = False
    """Whether the host goes on without waiting for queued work. If so, stages and encoders are recorded as graphs."""

    row_major: bool = False
    """Whether its libraries multiply matrices in 8 bits, which are row by row then; not so: our kernels, in tiles."""

    @property
    @abstractmethod
    def torch_device(self) -> torch.device:
        """torch's device for new tensors."""

    def pool(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A large uninitialised tensor whose parts are written and read in any order.

        Raises:
            RuntimeError, MemoryError: there is too little memory.
        """
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    @abstractmethod
    def staging(self, num_bytes: int) -> Tensor:
        """`[num_bytes]` uint8 in the host's memory to send from; not reused before transfers from it are done."""

    @abstractmethod
    def read(self, tensor: Tensor) -> Readback:
        """Queues the transfer of a tensor to the host and returns at once; `Readback.wait` waits for it.

        `PackedOutputs` brings several tensors in one transfer.
        """

    @abstractmethod
    def record(self, step: Step) -> Graph:
        """A graph of `step`, which runs at least once to be recorded."""

    @abstractmethod
    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Peak bytes that `work` allocates beyond those in use before it; 0 where the device cannot tell."""

    @abstractmethod
    def cache_bytes(self, utilization: float, reserved: int) -> int:
        """Bytes that a KV cache may take.

        Args:
            utilization: share of the device's memory that may be in use altogether.
            reserved: bytes of that share that are kept for later uses.

        Raises:
            CapacityError: nothing is left.
        """

    def upload(self, *arrays: Array) -> list[Tensor]:
        """Copies of `arrays` on the device, sent in one transfer. The host does not wait for it."""
        return upload(self.torch_device, *arrays, staging=self.staging)


class StaticInputs:
    """Arrays at fixed addresses on a device, for a graph to read."""

    def __init__(self, device: Device, arrays: Sequence[Array]) -> None:
        """
        Args:
            device: that holds the arrays.
            arrays: the first contents; later ones have the same shapes and dtypes.
        """
        self._device = device
        self._packing = Packing.of(arrays)
        self._block = torch.empty(self._packing.num_bytes, dtype=torch.uint8, device=device.torch_device)
        self.tensors = self._packing.views(self._block)
        """The arrays on the device."""
        self.set(arrays)

    def set(self, arrays: Sequence[Array]) -> None:
        """Sends new contents in one transfer. The host does not wait for it.

        Raises:
            ValueError: an array has another shape than before.
        """
        block = self._device.staging(self._packing.num_bytes)
        self._packing.fill(block, arrays)
        self._block.copy_(block, non_blocking=True)


class PackedOutputs:
    """Tensors on a device that work fills and one transfer brings to the host: parts of one block."""

    def __init__(self, device: Device, shapes: Sequence[tuple[Sequence[int], torch.dtype]]) -> None:
        """
        Args:
            device: that holds the tensors.
            shapes: and the dtype of each tensor.
        """
        self._device = device
        self._packing = Packing.of_shapes(shapes)
        self._block = torch.empty(self._packing.num_bytes, dtype=torch.uint8, device=device.torch_device)
        self.tensors = self._packing.views(self._block)
        """The tensors on the device, uninitialised."""

    def read(self) -> PackedReadback:
        """Queues the transfer, as `Device.read`."""
        return PackedReadback(self._device.read(self._block), self._packing)


@dataclass(frozen=True)
class PackedReadback:
    """The tensors of `PackedOutputs` on their way to the host."""

    block: Readback
    packing: Packing

    def wait(self) -> list[Array]:
        """The values of the tensors, once they have arrived."""
        return [view.numpy() for view in self.packing.views(torch.from_numpy(self.block.wait()))]
