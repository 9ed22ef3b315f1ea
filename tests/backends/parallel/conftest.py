"""Ranks without processes: each is a thread of the tests' process, with the same messages, pipes and gloo between them.

To start a process takes seconds, most of it for imports; a thread takes none. `test_processes.py` has real ones.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe

import pytest
import torch

from dpn_rt.backends.parallel import processes, worker


class RankThread:
    """Stands for the process of a rank."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._status = pipe, 0
        self.killed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._pipe:
            self._status = worker.run(self._pipe)

    def poll(self) -> int | None:
        """Status, as of `Popen`."""
        return None if self._thread.is_alive() else self._status

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the thread."""
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the rank goes on although rank 0 has ended"
        return self._status

    def kill(self) -> None:
        """Sets `killed`: a thread must end by itself."""
        self.killed.set()

    def lose_pipe(self) -> None:
        """As if rank 0 had ended: so does the rank."""
        with socket.fromfd(self._pipe.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as end:
            end.shutdown(socket.SHUT_RDWR)
        self.wait(10)


@pytest.fixture
def ranks_in_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RankThread]]:
    """The ranks that have been started."""
    threads: list[RankThread] = []

    def start(rank: int) -> processes.RankProcess:
        here, there = Pipe()
        threads.append(RankThread(there))
        return processes.RankProcess(rank, threads[-1], here)  # type: ignore[arg-type]

    monkeypatch.setattr(processes, "_start", start)
    num_threads = torch.get_num_threads()
    yield threads
    assert torch.get_num_threads() == num_threads, "an engine was not closed"
