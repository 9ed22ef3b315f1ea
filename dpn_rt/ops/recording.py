"""Calls of ops that are recorded once and repeated without Python between them, on the CPU."""

from __future__ import annotations

from types import TracebackType

from dpn_rt import _kernels


class Recording:
    """The ops that a thread calls within `with recording:`, which run as they are recorded.

    A recorded call has the addresses, shapes and other arguments that it was given. So the caller must keep the memory
    of all tensors as long as it replays; else a replay reads and writes freed memory. No other op can do that, so
    `dpn_rt.ops` does not export this class; `device/host_graph.py` uses it.
    """

    def __init__(self) -> None:
        self._calls = _kernels.Recording()

    def __enter__(self) -> Recording:
        """
        Raises:
            RuntimeError: this thread records already, or another thread records this.
        """
        self._calls.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._calls.end()

    def __len__(self) -> int:
        """Number of recorded calls."""
        return len(self._calls)

    def replay(self) -> None:
        """Runs the calls again, with the values that their tensors have now. They are checked again.

        Raises:
            KernelArgumentError: an op refuses the values. The calls before it have run.
            RuntimeError: this thread is recording.
        """
        self._calls.replay()
