"""An engine's loop on a thread of this process, where tests can reach the engine."""

from __future__ import annotations

import queue
import socket
import threading
from contextlib import suppress

from dpn_rt.engine.engine import Engine
from dpn_rt.server.engine_client.channel import Channel
from dpn_rt.server.engine_client.messages import Load
from dpn_rt.server.engine_client.process import EngineProcess
from dpn_rt.server.engine_client.worker import EngineLoop, Inbox


class LocalEngine(EngineProcess):
    """Replaces an engine's process for an `EngineClient`, with the same messages."""

    def __init__(self, engine: Engine) -> None:
        here, there = socket.socketpair()
        self.engine, self.load = engine, Load.of(engine)
        self._channel, self._far_end = Channel(here), Channel(there)
        self._inbox: Inbox = queue.SimpleQueue()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._receive, self._run)]
        for thread in self._threads:
            thread.start()

    def wait(self) -> str:
        for thread in self._threads:
            thread.join()
        return "the engine's threads have ended"

    def kill(self) -> None:
        self._channel.shut_down()

    def stop(self, seconds: float | None = None) -> None:
        self._channel.shut_down()
        self.wait()
        self._channel.close()
        self._far_end.close()

    def _receive(self) -> None:
        with suppress(EOFError):
            while True:
                self._inbox.put(self._far_end.receive())
        self._inbox.put(None)

    def _run(self) -> None:
        with suppress(EOFError):
            EngineLoop(self.engine, self._far_end, self._inbox).run()
