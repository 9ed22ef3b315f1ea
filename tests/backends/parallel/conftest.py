"""Ranks without processes: each is a thread of the tests' process, with the same messages, pipes and gloo between them.

To start a process takes seconds, most of it for imports; a thread takes none. `test_processes.py` has real ones.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe

import pytest
import torch

from dpn_rt.backends.parallel import processes, worker


class RankThread:
    """Stands for the process of a rank."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._pipe, suppress(EOFError, OSError, SystemExit):
            worker.work(self._pipe)

    def poll(self) -> int | None:
        """Status, as of `Popen`."""
        return None if self._thread.is_alive() else 0

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the thread."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the rank goes on although rank 0 has ended"
        return 0

    def kill(self) -> None:
        """A thread cannot be killed."""


@pytest.fixture
def ranks_in_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def start(rank: int) -> processes.RankProcess:
        here, there = Pipe()
        return processes.RankProcess(rank, RankThread(there), here)  # type: ignore[arg-type]

    monkeypatch.setattr(processes, "_start", start)
    num_threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == num_threads, "an engine was not closed"
