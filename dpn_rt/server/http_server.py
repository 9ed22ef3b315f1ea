"""The HTTP server: uvicorn with connections of our own, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Sequence
from types import FrameType

import uvicorn

from dpn_rt.server.connections import ConnectionCounter, within_open_files
from dpn_rt.server.http_protocol import GuardedProtocol
from dpn_rt.server.listener import Listener
from dpn_rt.server.service import Service
from dpn_rt.terminal import ending_signals

log = logging.getLogger(__name__)
LAST_CHUNKS = 5
"""Seconds for aborted requests to send their last chunks, before connections are cut."""
HURRY = 0.2
"""The same after a second signal, also for the engine to end its requests."""
LAST_RESORT = 1.5
"""Seconds after a second signal until the process is ended by force, whatever it waits for."""


class Server(uvicorn.Server):
    """On a signal of `ending_signals` it refuses new requests, lets the running ones end, aborts those left, and ends.

    A second signal ends it at once, even if the engine stands still. The server also ends when the engine has failed,
    so that a supervisor can start it again.
    """

    def __init__(
        self, config: uvicorn.Config, service: Service, end_process: Callable[[], object] | None = None
    ) -> None:
        """Args: end_process: ends the process by force; called where a second signal has not ended it in time."""
        super().__init__(config)
        config.timeout_keep_alive = service.config.connections.keep_alive_seconds  # type: ignore[assignment]
        self._service, self._end_process = service, end_process
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_hurried = False
        """A second signal has come."""
        self.connections = ConnectionCounter(service.config.connections)
        self.failure: Exception | None = None
        """What ended the engine, if that ended the server."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal handler."""
        if self._service.admission.is_closed:
            if not self.is_hurried:
                self._hurry()
            return
        self._service.admission.is_closed = True
        timeout = self._service.config.shutdown_timeout
        log.info("%s: no new requests; running ones get %g s", signal.Signals(sig).name, timeout)
        self._loop.call_soon_threadsafe(self._begin_shutdown, timeout)

    def _hurry(self) -> None:
        self.is_hurried = True
        self._service.engine.hurry()
        self._loop.call_soon_threadsafe(lambda: self._start(self._abort(HURRY)))
        self._loop.call_soon_threadsafe(self._loop.call_later, 2 * HURRY, self._force)
        if self._end_process is not None:
            timer = threading.Timer(LAST_RESORT, self._end_process)
            timer.daemon = True
            timer.start()

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Starts the application and listens on sockets of `bind`, which uvicorn lets callers leave out.

        Raises:
            OSError: the port is taken; ConfigError: the process may open hardly any files.
        """
        assert sockets, "expected the sockets of `bind`"
        bound = list(sockets)
        self.connections.max_open = within_open_files(self.connections.limits)
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise OSError("the server cannot start; the log says why")
        config, loop = self.config, self._loop

        def make_protocol() -> GuardedProtocol:
            count = self._service.metrics.count_refusal
            return GuardedProtocol(self.connections, count, config, self.server_state, self.lifespan.state, loop)

        listener = Listener(bound, make_protocol, self.connections, config.ssl, config.backlog)
        self.servers = [listener]  # type: ignore[list-item]
        self._log_started_message(bound)
        self.started = True

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Runs until a signal."""
        self._loop = asyncio.get_running_loop()
        watching = self._loop.create_task(self._end_with_engine())
        if threading.current_thread() is threading.main_thread():
            for number in set(ending_signals()) - {signal.SIGINT, signal.SIGTERM}:  # which uvicorn handles
                signal.signal(number, self.handle_exit)
        try:
            await super().serve(sockets)
        finally:
            watching.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends connections, then the application. Requests that are still there are cancelled, and told so."""
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves the rest out
            tasks = list(self.server_state.tasks)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=HURRY)
            await self.lifespan.shutdown()

    async def _end_with_engine(self) -> None:
        self.failure = await self._service.engine.failed()
        log.error("the engine has stopped, and the server with it: %s", self.failure)
        self._service.admission.is_closed = True
        # Every request ends now, with an error. A client that does not read it keeps the server no longer than this.
        self._loop.call_later(LAST_CHUNKS, setattr, self, "should_exit", True)
        await self._drain()

    def _begin_shutdown(self, timeout: float) -> None:
        self._loop.call_later(timeout, lambda: self._start(self._abort(LAST_CHUNKS)))
        self._start(self._drain())

    def _force(self) -> None:
        self.force_exit = True
        self._service.engine.kill()

    async def _drain(self) -> None:
        while self._service.admission.active:
            await asyncio.sleep(0.02)
        self.should_exit = True

    async def _abort(self, seconds: float) -> None:
        log.warning("aborting %d requests", self._service.admission.active)
        self._loop.call_later(seconds, setattr, self, "should_exit", True)
        await self._service.engine.abort_all(seconds)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets of all addresses of a host, as asyncio binds them. They do not listen yet.

    Raises:
        OSError: the host has no address here, or the port is taken.
    """

    async def bound() -> list[socket.socket]:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(asyncio.Protocol, host, port, start_serving=False)
        try:
            return [sock.dup() for sock in server.sockets]
        finally:
            server.close()

    return asyncio.run(bound())


def uvicorn_config(app: object, **options: object) -> uvicorn.Config:
    """Settings of uvicorn: logs as `set_up_logs` has them, HTTP/1.1 alone."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http="httptools",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_CHUNKS,
        **options,  # type: ignore[arg-type]
    )
