"""The process of a rank after rank 0: `python -m dpn_rt.backends.parallel.worker FD`, started by `RankProcesses`."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

from dpn_rt.backends.kernels.executor import LocalExecutor
from dpn_rt.backends.parallel.calls import Call
from dpn_rt.backends.parallel.group import ProcessRankGroup
from dpn_rt.backends.parallel.messages import AllLoaded, PoolSize, RankFailed, RankLoaded, RankSource
from dpn_rt.backends.parallel.part import RankPart
from dpn_rt.errors import CapacityError, DpnError
from dpn_rt.memory import lacks_memory, not_enough_memory

Loaded = TypeVar("Loaded")
Message = TypeVar("Message")


def main() -> None:
    """Loads the part of a decoder that the first message names, then computes it until rank 0 ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a service; rank 0 acts on them
        signal.signal(number, signal.SIG_IGN)
    pipe = Connection(int(sys.argv[1]))
    try:
        work(pipe)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # rank 0 has ended
    except Exception as error:
        failed = time.monotonic()
        traceback.print_exc()
        _tell(pipe, RankFailed(f"{error!r:.1000}", failed))
        os._exit(1)


def work(pipe: Connection) -> None:
    """Loads and computes, in turn with rank 0.

    Raises:
        EOFError: rank 0 has ended.
        SystemExit: rank 0 has been told that the part cannot be loaded.
        Exception: of a call.
    """
    source = _expect(pipe, RankSource)
    torch.set_num_threads(source.num_threads)
    try:
        part = _loaded(pipe, source, lambda: RankPart.load_other(source))
        _expect(pipe, AllLoaded)
        part.group.connect(source.store, part.device.torch_device)
        part.pool_bytes(source.model, None, source.settings)  # rank 0 decides, but a GPU computes the same on all ranks
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
        known = CapacityError(not_enough_memory(source.path)) if lacks_memory(error) else error
        if not isinstance(known, DpnError):
            raise
        pipe.send(RankLoaded(known))
        raise SystemExit(1) from error
    pipe.send(RankLoaded())
    return loaded


def _serve(executor: LocalExecutor, group: ProcessRankGroup, pipe: Connection, device: torch.device) -> None:
    """Makes the calls that rank 0 sends, until it ends."""
    with torch.inference_mode():
        while True:
            call: Call = pipe.recv()
            block = call.empty_block(device)
            if call.packing.num_bytes:
                group.broadcast(block)
            getattr(executor, call.method)(*call.unpacked(block))


def _expect(pipe: Connection, kind: type[Message]) -> Message:
    message = pipe.recv()
    assert isinstance(message, kind), f"rank 0 has sent {message!r:.80}: expected {kind.__name__}"
    return message


def _tell(pipe: Connection, message: object) -> None:
    try:
        pipe.send(message)
    except OSError:
        os._exit(1)


if __name__ == "__main__":
    main()
