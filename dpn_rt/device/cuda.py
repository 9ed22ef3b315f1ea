"""The CUDA device, through torch. This module has not been run on a GPU yet."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dpn_rt.device.device import Device, Step
from dpn_rt.device.packing import Array
from dpn_rt.errors import CapacityError


class CudaGraph:
    """A `Graph` that the driver launches with one call."""

    def __init__(self, step: Step, stream: torch.cuda.Stream, pool: object) -> None:
        """
        Args:
            step: to record.
            stream: to record on; not the stream that work is queued on.
            pool: memory pool, shared by graphs that never run at the same time.
        """
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # libraries initialise themselves in their first call, which cannot be recorded
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: what they may not do in a recording concerns theirs alone.
        recording = torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local")  # type: ignore[arg-type]
        with without_collector(), recording:
            self.outputs = step()

    def replay(self) -> None:
        """Queues the step on torch's current stream."""
        self._graph.replay()


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Python's garbage collector is off meanwhile: graphs and events that it destroys would end a recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True)
class CudaReadback:
    """A transfer to pinned memory, and an event that is recorded after it."""

    target: Tensor
    done: torch.cuda.Event

    def wait(self) -> Array:
        """The values, once the transfer is done."""
        self.done.synchronize()
        return self.target.numpy()


class CudaDevice(Device):
    """The current GPU; work is queued on torch's current stream."""

    is_async = True
    row_major = True

    def __init__(self) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def torch_device(self) -> torch.device:
        return self._device

    def staging(self, num_bytes: int) -> Tensor:
        # torch reuses pinned memory only after the transfers from it are done.
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True, device="cpu")

    def read(self, tensor: Tensor) -> CudaReadback:
        target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu")
        target.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._device))
        return CudaReadback(target, done)

    def record(self, step: Step) -> CudaGraph:
        return CudaGraph(step, self._stream, self._pool)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        work()
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device) - before
        torch.cuda.empty_cache()
        return peak

    def cache_bytes(self, utilization: float, reserved: int) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return cache_share(free, total, utilization, reserved)


def cache_share(free: int, total: int, utilization: float, reserved: int) -> int:
    """Bytes for a KV cache on a GPU.

    Args:
        free: bytes that are free after the weights are loaded.
        total: bytes of the GPU.
        utilization: share of `total` that may be in use, by this and other processes together.
        reserved: bytes of that share that are kept for later uses.

    Raises:
        CapacityError: nothing is left.
    """
    share = int(total * utilization) - (total - free) - reserved
    if share <= 0:
        raise CapacityError(
            f"the GPU has no room for a KV cache: of {total:,} bytes {total - free:,} are taken, {reserved:,} are "
            f"needed for the largest prefill and for reuse, and gpu_memory_utilization={utilization} allows "
            f"{int(total * utilization):,} in all: raise it, or lower max_num_batched_tokens or reuse_bytes"
        )
    return share
