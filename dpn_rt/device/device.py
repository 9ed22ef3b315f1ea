"""What the runtime asks of the place where its tensors are. Two answers: `host.py` and `cuda.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dpn_rt.device.packing import Array, Packing
from dpn_rt.device.transfer import upload

Step = Callable[[], tuple[Tensor, ...]]
"""Work on tensors that stay where they are; no transfers, nothing read by the host."""


class Graph(Protocol):
    """A step that was recorded once and can be repeated with other contents of its inputs."""

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """Of the last `replay`, always the same memory."""

    def replay(self) -> None:
        """Queues the step."""


class Readback(Protocol):
    """Tensors on their way to the host."""

    def wait(self) -> list[Array]:
        """Their values, as soon as they are there."""


class Device(ABC):
    """Memory and a queue of work. Work on the device follows in the order in which it was queued."""

    is_async: bool = False
    """Whether work is queued for which the host does not wait. Steps are then recorded as graphs."""

    @property
    @abstractmethod
    def torch_device(self) -> torch.device:
        """Where tensors are made."""

    def pool(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A large tensor, not initialised, of which pieces are written and read in any order.

        Raises:
            RuntimeError, MemoryError: there is too little memory.
        """
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    @abstractmethod
    def staging(self, num_bytes: int) -> Tensor:
        """`[num_bytes]` uint8 in the host's memory that transfers read from, its own until they have."""

    @abstractmethod
    def read(self, *tensors: Tensor) -> Readback:
        """Queues transfers of tensors to the host, which does not wait for them yet."""

    @abstractmethod
    def record(self, step: Step) -> Graph:
        """A graph of a step, which runs for that once or more."""

    @abstractmethod
    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Memory that some work takes at most, beyond what is taken before; 0 where that is not told."""

    @abstractmethod
    def cache_bytes(self, utilization: float, reserved: int) -> int:
        """Memory that a KV cache may take.

        Args:
            utilization: part of the device's memory that the runtime may take in all.
            reserved: bytes of that for other things yet to come.

        Raises:
            CapacityError: nothing is left.
        """

    def upload(self, *arrays: Array) -> list[Tensor]:
        """Copies of arrays on the device, by one transfer for which the host does not wait."""
        return upload(self.torch_device, *arrays, staging=self.staging)


class StaticInputs:
    """Arrays at fixed places on a device, for a graph to read."""

    def __init__(self, device: Device, arrays: Sequence[Array]) -> None:
        """Places for arrays like these, which they hold at first."""
        self._device = device
        self._packing = Packing.of(arrays)
        self._block = torch.empty(self._packing.num_bytes, dtype=torch.uint8, device=device.torch_device)
        self.tensors = self._packing.views(self._block)
        """On the device."""
        self.set(arrays)

    def set(self, arrays: Sequence[Array]) -> None:
        """New contents, by one transfer for which the host does not wait.

        Raises:
            ValueError: an array has another shape than its place.
        """
        block = self._device.staging(self._packing.num_bytes)
        self._packing.fill(block, arrays)
        self._block.copy_(block, non_blocking=True)
