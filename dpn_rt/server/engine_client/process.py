"""The engine's process: neither HTTP nor the decoding of images takes Python's lock from the engine's steps."""

from __future__ import annotations

import signal
import socket
import subprocess
from contextlib import suppress
from types import TracebackType

from dpn_rt.errors import EngineError
from dpn_rt.schema.processes import start_module
from dpn_rt.server.engine_client import worker
from dpn_rt.server.engine_client.channel import Channel
from dpn_rt.server.engine_client.messages import EngineSource, Load, Loaded

LIKELY_CAUSES = {
    "SIGBUS": " (was a file of the engine cut while it ran?)",
    "SIGKILL": " (by the system, if there was too little memory)",
}
SECONDS_TO_END = 5.0
"""For the process, before it is killed."""


class EngineProcess:
    """A process that loads an engine and steps it. It ends with this process, however this one ends.

    As a context manager it stops the process on exit.
    """

    load = Load()
    """Of the engine when it had been loaded."""

    def __init__(self, source: EngineSource) -> None:
        """Begins to load the engine."""
        here, there = socket.socketpair()
        with there:
            self._process = start_module(worker.__name__, there.fileno())
        self._channel = Channel(here)
        with suppress(EOFError):  # it has ended already, as `wait_until_loaded` will say
            self._channel.send(source)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until_loaded(self) -> None:
        """To be called once, before `connection`.

        Raises:
            DpnError: as `load_engine`; EngineError: the process has ended.
        """
        try:
            loaded: Loaded = self._channel.receive()
        except EOFError:
            raise EngineError(f"{self.wait()} while it loaded the engine") from None
        if loaded.error is not None:
            raise loaded.error
        self.load = loaded.load

    def connection(self) -> socket.socket:
        """This end of the socket, for the event loop that takes it over."""
        return self._channel.duplicate()

    def wait(self) -> str:
        """Waits until the process has ended; says how it did."""
        status = self._process.wait()
        if status >= 0:
            return f"the engine's process ended with status {status}"
        name = signal.Signals(-status).name
        return f"the engine's process was killed by {name}{LIKELY_CAUSES.get(name, '')}"

    def kill(self) -> None:
        """Ends the process by force, without waiting."""
        self._process.kill()

    def stop(self, seconds: float | None = None) -> None:
        """Ends the process, in the middle of a step if need be, and waits until it has ended.

        Args:
            seconds: for it to end by itself; None: a few.
        """
        self._channel.shut_down()
        try:
            self._process.wait(SECONDS_TO_END if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._channel.close()
