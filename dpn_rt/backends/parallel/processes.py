"""The processes of the ranks after rank 0: start, messages, end. They end with rank 0's process, however it ends."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from dpn_rt.backends.parallel import worker
from dpn_rt.backends.parallel.messages import RankFailed, RankLoaded, RankSource
from dpn_rt.errors import DeviceError, EngineError
from dpn_rt.schema.processes import start_module

SECONDS_TO_LOAD = 1800.0
"""For a rank's part of the weights, from the slowest disk."""
SECONDS_TO_END = 5.0
"""For a process, before it is killed."""
SECONDS_TO_FAIL = 2.0
"""From a failure that rank 0 notices until the rank that caused it has said why, or has ended."""


@dataclass(frozen=True, eq=False)
class RankProcess:
    """One of them."""

    rank: int
    process: subprocess.Popen[bytes]
    pipe: Connection

    def how_it_ended(self) -> str | None:
        """What became of it; None while it runs."""
        status = self.process.poll()
        if status is None:
            return None
        if status >= 0:
            return f"its process ended with status {status}"
        cause = " (by the system, if there was too little memory)" if -status == signal.SIGKILL else ""
        return f"its process was killed by {signal.Signals(-status).name}{cause}"


class RankProcesses:
    """Ranks 1 and up of one engine."""

    def __init__(self, size: int) -> None:
        """Begins to start `size - 1` processes, which wait for `send_sources`.

        Raises:
            EngineError: the system refuses a process or a directory.
        """
        self.size, self._owner = size, os.getpid()
        self._ranks: list[RankProcess] = []
        try:
            self.directory = Path(tempfile.mkdtemp(prefix="dpn-rt-ranks-"))
            self._finalizer = weakref.finalize(self, _end, self._ranks, self.directory)
            os.register_at_fork(after_in_child=partial(_forget, weakref.ref(self)))
            for rank in range(1, size):
                self._ranks.append(_start(rank))
        except OSError as error:
            for started in self._ranks:
                started.process.kill()
            raise EngineError(f"the processes of {size} ranks cannot be started: {error}") from error

    @property
    def store(self) -> Path:
        """Where the ranks find each other."""
        return self.directory / "store"

    @property
    def process_ids(self) -> list[int]:
        """Of ranks 1 and up."""
        return [rank.process.pid for rank in self._ranks]

    def send_sources(self, sources: Sequence[RankSource]) -> None:
        """Tells each rank, from 1 on, what to load."""
        for rank, source in zip(self._ranks, sources, strict=True):
            with suppress(OSError):  # it has ended already, as `wait_until_loaded` will say
                rank.pipe.send(source)

    def wait_until_loaded(self) -> None:
        """Returns when every rank has its weights; the second time, its KV blocks.

        Raises:
            DpnError: a rank could not load its part, has ended, or takes too long.
        """
        for rank in self._ranks:
            name, deadline = f"rank {rank.rank} of {self.size}", time.monotonic() + SECONDS_TO_LOAD
            while not rank.pipe.poll(SECONDS_TO_FAIL) and rank.process.poll() is None:
                if time.monotonic() > deadline:
                    raise EngineError(f"{name} has not loaded its weights in {SECONDS_TO_LOAD:.0f} s")
            message = _received(rank)
            if isinstance(message, RankLoaded):
                if message.error is not None:
                    raise type(message.error)(f"{name}: {message.error}")
                continue
            raise EngineError(f"{name} could not load the engine: {_reason(rank, message)}")

    def send(self, message: object) -> None:
        """To every rank.

        Raises:
            DeviceError: one has ended, or this is a process that was forked from rank 0's.
        """
        if os.getpid() != self._owner:
            raise DeviceError(
                f"process {os.getpid()} was forked from the one that loaded the engine, {self._owner}: expected "
                "requests there, several ranks cannot be forked"
            )
        try:
            for rank in self._ranks:
                rank.pipe.send(message)
        except OSError as error:
            raise self.failure(error) from error

    def failure(self, error: BaseException) -> DeviceError:
        """What has ended the engine, after `error` in a call that all ranks were to make."""
        wait([rank.pipe for rank in self._ranks], timeout=SECONDS_TO_FAIL)
        heard = [(rank, _received(rank)) for rank in self._ranks if rank.pipe.poll() or rank.process.poll() is not None]
        text = f"the {self.size} ranks of the engine are out of step after an error of rank 0: {error!r:.500}"
        if heard:
            first, message = min(heard, key=lambda each: _failed_at(each[1]))
            text = f"rank {first.rank} of {self.size} failed: {_reason(first, message)}"
        for rank in self._ranks:
            rank.process.kill()  # it waits for others, or does not answer at all
        return DeviceError(text)

    def end(self) -> None:
        """Ends the processes, in the middle of a call if need be, and waits until they have ended."""
        self._finalizer()


def _start(rank: int) -> RankProcess:
    here, there = Pipe()
    with there:
        process = start_module(worker.__name__, there.fileno())
    return RankProcess(rank, process, here)


def _forget(reference: weakref.ref[RankProcesses]) -> None:
    """In a process that was forked from rank 0's: the ranks are not its own, and must not wait for its end.

    They end when the last copy of the pipe is closed.
    """
    ranks = reference()
    if ranks is not None:
        ranks._finalizer.detach()
        for rank in ranks._ranks:
            rank.pipe.close()


def _failed_at(message: object) -> float:
    """The first rank to fail makes the others fail that wait for it; one without a last word was killed."""
    return message.time if isinstance(message, RankFailed) else -math.inf


def _received(rank: RankProcess) -> Any:
    """The next message; None where there is none any more.

    That the process has ended counts too: the pipe may still be open in one that was forked while it was started.
    """
    try:
        return rank.pipe.recv() if rank.pipe.poll() or rank.process.poll() is None else None
    except (EOFError, OSError):
        return None


def _reason(rank: RankProcess, message: object) -> str:
    if isinstance(message, RankFailed):
        return message.reason
    with suppress(subprocess.TimeoutExpired):
        rank.process.wait(SECONDS_TO_FAIL)
    return rank.how_it_ended() or "it has closed its pipe"


def _end(ranks: Sequence[RankProcess], directory: Path) -> None:
    for rank in ranks:
        rank.pipe.close()
    for rank in ranks:
        try:
            rank.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()
    shutil.rmtree(directory, ignore_errors=True)
