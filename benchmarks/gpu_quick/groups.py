"""Processes that are ended together with all that they have started, also where this process is told to end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any


class Groups:
    """Starts each process in a group of its own, from any thread."""

    def __init__(self) -> None:
        self._running: set[int] = set()
        self._lock = threading.RLock()
        self._is_over = False

    def run(
        self,
        command: Sequence[str],
        seconds: float,
        *,
        cwd: os.PathLike[str],
        env: Mapping[str, str],
        output: IO[bytes],
    ) -> int | None:
        """The exit status; None where it was ended, after `seconds` or by `end`. Its children end with it."""
        with self._lock:
            if self._is_over:
                return None
            process = subprocess.Popen(
                command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                process_group=0,
            )  # fmt: skip
            self._running.add(process.pid)
        try:
            status = process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with self._lock:
                _kill(process.pid)
                self._running.remove(process.pid)
            process.wait()
        return None if self._is_over else status

    def end(self) -> None:
        """End all that run, and start no others."""
        with self._lock:
            self._is_over = True
            for group in self._running:
                _kill(group)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


@contextlib.contextmanager
def groups() -> Iterator[Groups]:
    """Groups that end with the block, or on SIGTERM, which ends this process too."""
    found = Groups()

    def end(*_: Any) -> None:
        found.end()
        sys.exit(128 + signal.SIGTERM)

    is_main = threading.current_thread() is threading.main_thread()  # others cannot handle signals
    before = signal.signal(signal.SIGTERM, end) if is_main else None
    try:
        yield found
    finally:
        found.end()
        if is_main:
            signal.signal(signal.SIGTERM, before)
