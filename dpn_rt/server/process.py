"""The server's process: uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal
from types import FrameType

import uvicorn

from dpn_rt.server.service import Service

log = logging.getLogger(__name__)
LAST_CHUNKS = 5
"""Seconds for aborted requests to send how they ended, before connections are cut."""


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT: refuse new requests, let the running ones end, abort what is left, leave.

    A second signal aborts at once. Leaves too when the engine has failed, so that a supervisor starts it again.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._deadline: asyncio.TimerHandle | None = None
        self._aborting: asyncio.Task[None] | None = None
        self.failure: Exception | None = None
        """Of the engine, if that has ended the server."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal's handler."""
        loop = self._loop
        if self._service.admission.is_closed:
            loop.call_soon_threadsafe(self._abort)
            return
        self._service.admission.is_closed = True
        seconds = self._service.config.shutdown_timeout
        log.info("%s: no new requests; running ones get %g s", signal.Signals(sig).name, seconds)
        loop.call_soon_threadsafe(self._begin_to_end, seconds)

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Binds the port; uvicorn would log and exit with a status of its own."""
        try:
            await super().startup(sockets)  # type: ignore[arg-type]
        except SystemExit as error:
            raise OSError("cannot listen there; the log says why") from error

    async def serve(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Runs until a signal."""
        self._loop = asyncio.get_running_loop()
        watching = self._loop.create_task(self._leave_with_engine())
        try:
            await super().serve(sockets)  # type: ignore[arg-type]
        finally:
            watching.cancel()

    async def _leave_with_engine(self) -> None:
        self.failure = await self._service.engine.failed()
        log.error("the engine has stopped, and the server with it: %s", self.failure)
        self._service.admission.is_closed = True
        self._loop.call_later(LAST_CHUNKS, setattr, self, "should_exit", True)  # though somebody does not read the end
        await self._drain()  # every request ends now, with an error

    def _begin_to_end(self, seconds: float) -> None:
        self._deadline = self._loop.call_later(seconds, self._abort)
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
    """uvicorn's settings: our logging, short limits for idle connections."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_config=None,
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=LAST_CHUNKS,
        **options,  # type: ignore[arg-type]
    )
