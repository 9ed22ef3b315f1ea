"""The process of a rank after rank 0: `python -m dpn_rt.backends.parallel.worker FD`, started by `RankProcesses`."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from dpn_rt.backends.parallel.calls import Call
from dpn_rt.backends.parallel.group import ProcessRankGroup
from dpn_rt.backends.parallel.messages import AllLoaded, PoolSize, RankFailed, RankLoaded, RankSource
from dpn_rt.backends.parallel.part import RankExecutor, RankPart
from dpn_rt.errors import CapacityError, DpnError
from dpn_rt.memory import lacks_memory, not_enough_memory

Loaded = TypeVar("Loaded")
Message = TypeVar("Message")


class RankZeroEndedError(Exception):
    """Rank 0 has ended, or has closed its end of the pipe: there is nothing left to do."""


def main() -> None:
    """Is a rank until rank 0 ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to all processes; rank 0 acts on them
        signal.signal(number, signal.SIG_IGN)
    os._exit(run(Connection(int(sys.argv[1]))))


def run(pipe: Connection) -> int:
    """Loads the part of a model that the first message names, then computes it until rank 0 ends.

    Returns:
        The status of the process: 1 after an error, which rank 0 has been told.
    """
    try:
        _work(pipe)
    except RankZeroEndedError:
        return 0
    except SystemExit:
        return 1  # rank 0 has been told
    except Exception as error:
        failed = time.monotonic()
        traceback.print_exc()
        with suppress(RankZeroEndedError):
            _send(pipe, RankFailed(f"{error!r:.1000}", failed))
    return 1


def _work(pipe: Connection) -> None:
    """Loads and computes, in turn with rank 0, until an error; SystemExit where rank 0 has been told of it."""
    source = _expect(pipe, RankSource)
    torch.set_num_threads(source.num_threads)
    try:
        part = _loaded(pipe, source, lambda: RankPart.load_other(source))
        _expect(pipe, AllLoaded)
        part.group.connect(source.store, part.device.torch_device)
        part.pool_bytes(source.model, source.settings)  # rank 0 decides, but a GPU computes the same on all ranks
        size = _expect(pipe, PoolSize)
        executor = _loaded(pipe, source, lambda: part.executor(size.num_blocks))
        _serve(executor, part.group, pipe, part.device.torch_device)
    finally:
        shutil.rmtree(source.store.parent, ignore_errors=True)  # rank 0 cannot, if it was killed


def _loaded(pipe: Connection, source: RankSource, load: Callable[[], Loaded]) -> Loaded:
    """What `load` gives; rank 0 is told that it is there, or why it cannot be."""
    try:
        loaded = load()
    except Exception as error:
        known = CapacityError(not_enough_memory(source.engine.path)) if lacks_memory(error) else error
        if not isinstance(known, DpnError):
            raise
        _send(pipe, RankLoaded(known))
        raise SystemExit(1) from error
    _send(pipe, RankLoaded())
    return loaded


def _serve(executor: RankExecutor, group: ProcessRankGroup, pipe: Connection, device: torch.device) -> None:
    """Makes the calls that rank 0 sends, until it ends."""
    with torch.inference_mode():
        while True:
            call: Call = _receive(pipe)
            block = call.empty_block(device)
            if call.packing.num_bytes:
                group.broadcast(block)
            getattr(executor, call.method)(*call.unpacked(block))


def _expect(pipe: Connection, kind: type[Message]) -> Message:
    message = _receive(pipe)
    assert isinstance(message, kind), f"rank 0 has sent {message!r:.80}: expected {kind.__name__}"
    return message


def _receive(pipe: Connection) -> Any:
    """The next message. Errors of the pipe alone say that rank 0 has ended, not those of what is done with it."""
    try:
        data = pipe.recv_bytes()
    except (EOFError, OSError) as error:
        raise RankZeroEndedError from error
    return pickle.loads(data)


def _send(pipe: Connection, message: object) -> None:
    try:
        pipe.send(message)
    except OSError as error:
        raise RankZeroEndedError from error


if __name__ == "__main__":
    main()
