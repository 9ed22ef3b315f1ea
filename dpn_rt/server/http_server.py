"""The HTTP server: uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal
from types import FrameType

import uvicorn

from dpn_rt.server.service import Service

log = logging.getLogger(__name__)
LAST_CHUNKS = 5
"""Seconds for aborted requests to send their last chunks, before connections are cut."""


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT it refuses new requests, lets the running ones end, aborts those left, and ends.

    A second signal aborts at once. The server also ends when the engine has failed, so that a supervisor can start it
    again.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._deadline: asyncio.TimerHandle | None = None
        self._aborting: asyncio.Task[None] | None = None
        self.failure: Exception | None = None
        """What ended the engine, if that ended the server."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal handler."""
        loop = self._loop
        if self._service.admission.is_closed:
            loop.call_soon_threadsafe(self._abort)
            return
        self._service.admission.is_closed = True
        timeout = self._service.config.shutdown_timeout
        log.info("%s: no new requests; running ones get %g s", signal.Signals(sig).name, timeout)
        loop.call_soon_threadsafe(self._begin_shutdown, timeout)

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Binds the port. Raises OSError if it cannot; uvicorn would exit with a status of its own."""
        try:
            await super().startup(sockets)  # type: ignore[arg-type]
        except SystemExit as error:
            raise OSError("cannot listen there; the log says why") from error

    async def serve(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Runs until a signal."""
        self._loop = asyncio.get_running_loop()
        watching = self._loop.create_task(self._end_with_engine())
        try:
            await super().serve(sockets)  # type: ignore[arg-type]
        finally:
            watching.cancel()

    async def _end_with_engine(self) -> None:
        self.failure = await self._service.engine.failed()
        log.error("the engine has stopped, and the server with it: %s", self.failure)
        self._service.admission.is_closed = True
        # Every request ends now, with an error. A client that does not read it keeps the server no longer than this.
        self._loop.call_later(LAST_CHUNKS, setattr, self, "should_exit", True)
        await self._drain()

    def _begin_shutdown(self, timeout: float) -> None:
        self._deadline = self._loop.call_later(timeout, self._abort)
        self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        while self._service.admission.active:
            await asyncio.sleep(0.02)
        self.should_exit = True

    def _abort(self) -> None:
        log.warning("aborting %d requests", self._service.admission.active)
        self._aborting = self._loop.create_task(self._service.engine.abort_all())
        self._loop.call_later(LAST_CHUNKS, setattr, self, "should_exit", True)


def uvicorn_config(app: object, **options: object) -> uvicorn.Config:
    """Settings of uvicorn: logs as `set_up_logs` has them, short limits for idle connections."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_config=None,
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=LAST_CHUNKS,
        **options,  # type: ignore[arg-type]
    )
