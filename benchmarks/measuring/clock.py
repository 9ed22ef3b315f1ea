"""Time on a device: events of the stream on a GPU, the host's clock on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from dpn_rt.device.cuda import without_collector

Run = Callable[[], object]
SLEEP_CYCLES = 1_000_000
"""Half a millisecond of a GPU: longer than the host takes to queue both events and what is between them."""


def is_cuda(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def synchronize(device: str | torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


def seconds(run: Run, device: str | torch.device = "cpu") -> float:
    """Seconds that `run` takes. On a GPU the time between two events, without the host's wait."""
    if not is_cuda(device):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    keep_busy()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def keep_busy() -> None:
    """Let the GPU wait, so that it begins once the next work is queued: its launch would count as the work's time."""
    sleep = getattr(torch.cuda, "_sleep", None)  # not part of torch's public interface
    if sleep is not None:
        sleep(SLEEP_CYCLES)


def replayable(run: Run, device: str | torch.device) -> Run:
    """`run` without the host's overhead: on a GPU a captured graph, which launches kernels without gaps."""
    if not is_cuda(device):
        return run
    warm_up = torch.cuda.Stream(device)
    warm_up.wait_stream(torch.cuda.current_stream(device))  # which may still be making the inputs
    with torch.cuda.stream(warm_up):  # makes workspaces and loads modules before the capture
        run()
    torch.cuda.current_stream(device).wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with without_collector(), torch.cuda.graph(graph):
        run()
    return graph.replay


class Mark:
    """A moment on a device: reached once all work queued before it is done."""

    def __init__(self, device: str | torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if is_cuda(device) else None
        self._host_seconds = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def seconds_until(self, later: Mark) -> float:
        """Seconds between two moments that the device has reached."""
        if self._event is not None and later._event is not None:
            return self._event.elapsed_time(later._event) / 1e3
        return later._host_seconds - self._host_seconds


class Stopwatch:
    """Sums the time of calls within a longer run, without synchronizing a GPU for each."""

    def __init__(self, device: str | torch.device) -> None:
        self._device = device
        self._spans: list[tuple[Mark, Mark]] = []

    def __call__(self, run: Callable[[], object]) -> object:
        """Time `run`, and return its result."""
        begin = self.mark()
        result = run()
        self.add(begin, self.mark())
        return result

    def mark(self) -> Mark:
        """The current moment."""
        return Mark(self._device)

    def add(self, begin: Mark, end: Mark) -> None:
        """Add the time between two moments."""
        self._spans.append((begin, end))

    @property
    def seconds(self) -> float:
        """Sum so far; waits for the device."""
        synchronize(self._device)
        return sum(begin.seconds_until(end) for begin, end in self._spans)
