"""The host as a device: work runs at once, and nothing needs a transfer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpn_rt.device.device import Device, Step
from dpn_rt.device.free_memory import free_memory
from dpn_rt.device.huge_pages import huge_memory
from dpn_rt.device.packing import Array


class RepeatedStep:
    """A `Graph` of any step: runs it again, and copies the results over the outputs of the first run.

    `host_graph.py` has one for steps of ops alone.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self.outputs = step()

    def replay(self) -> None:
        """Runs the step."""
        for output, new in zip(self.outputs, self._step(), strict=True):
            output.copy_(new)


@dataclass(frozen=True)
class HostReadback:
    """A `Readback` of a tensor that is on the host already."""

    tensor: Tensor

    def wait(self) -> Array:
        """Its values, without a copy."""
        return self.tensor.numpy()


class HostDevice(Device):
    """The CPU."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    def pool(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `Device.pool`, in huge pages where the system has them (`huge_memory`)."""
        num_bytes = math.prod(shape) * dtype.itemsize
        return huge_memory(num_bytes).view(dtype).view(*shape) if num_bytes else super().pool(shape, dtype)

    def staging(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")

    def read(self, tensor: Tensor) -> HostReadback:
        return HostReadback(tensor)

    def record(self, step: Step) -> RepeatedStep:
        return RepeatedStep(step)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        return 0

    def cache_bytes(self, utilization: float, reserved: int) -> int:
        """A quarter of the free memory, since other programs use this machine too."""
        return free_memory() // 4
