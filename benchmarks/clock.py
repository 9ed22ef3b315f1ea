"""Time on a device: events of the stream on a GPU, the host's clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Run = Callable[[], object]


def is_cuda(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def synchronize(device: str | torch.device) -> None:
    """Until the device has done what was asked of it."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


def seconds(run: Run, device: str | torch.device = "cpu") -> float:
    """That `run` takes. On a GPU what the device does between two events, without the wait of the host."""
    if not is_cuda(device):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def replayable(run: Run, device: str | torch.device) -> Run:
    """`run` without the host's share: on a GPU a captured graph, so that short kernels follow each other at once."""
    if not is_cuda(device):
        return run
    warm_up = torch.cuda.Stream(device)
    with torch.cuda.stream(warm_up):  # workspaces and lazily loaded modules, before anything is captured
        run()
    torch.cuda.current_stream(device).wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Mark:
    """A moment on a device: behind all that was queued before it."""

    def __init__(self, device: str | torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if is_cuda(device) else None
        self._host_seconds = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def seconds_until(self, later: Mark) -> float:
        """Both must have been reached."""
        if self._event is not None and later._event is not None:
            return self._event.elapsed_time(later._event) / 1e3
        return later._host_seconds - self._host_seconds


class Stopwatch:
    """Sums the time of calls that are made within a longer run, without stopping a GPU for it."""

    def __init__(self, device: str | torch.device) -> None:
        self._device = device
        self._spans: list[tuple[Mark, Mark]] = []

    def __call__(self, run: Callable[[], object]) -> object:
        """What `run` returns."""
        begin = self.mark()
        result = run()
        self.add(begin, self.mark())
        return result

    def mark(self) -> Mark:
        """Now."""
        return Mark(self._device)

    def add(self, begin: Mark, end: Mark) -> None:
        """The time between two moments."""
        self._spans.append((begin, end))

    @property
    def seconds(self) -> float:
        """So far; waits for the device."""
        synchronize(self._device)
        return sum(begin.seconds_until(end) for begin, end in self._spans)
