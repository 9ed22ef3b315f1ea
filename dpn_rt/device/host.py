"""The host as a device: work runs at once, and nothing needs a transfer."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpn_rt.device.device import Device, Step
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
        """As `Device.pool`, in huge pages where the system has them.

        Reads of scattered KV blocks in small pages wait for address translation. The system provides a page when it is
        first written.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes or not hasattr(mmap, "MADV_HUGEPAGE"):
            return super().pool(shape, dtype)
        try:
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"{num_bytes:,} bytes: {error}") from error
        with suppress(OSError):  # a system built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=dtype).view(*shape)

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


def free_memory() -> int:
    """Bytes of memory that can be allocated without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
