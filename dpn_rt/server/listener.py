"""Accepts connections, no more than may be open. asyncio's own server takes all that come, and fails without room."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from dpn_rt.server.connections import ConnectionCounter
from dpn_rt.server.http_protocol import GuardedProtocol

ACCEPT_AT_ONCE = 32
"""Connections between two looks at everything else."""
RETRY_SECONDS = 0.1
"""After the system had no room for a connection."""
log = logging.getLogger(__name__)


class Listener:
    """Accepts connections on some sockets. Used on one event loop; stands for an asyncio server in uvicorn."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        make_protocol: Callable[[], GuardedProtocol],
        counter: ConnectionCounter,
        ssl_context: ssl.SSLContext | None,
        backlog: int,
    ) -> None:
        self.sockets, self._make_protocol, self._counter, self._ssl = list(sockets), make_protocol, counter, ssl_context
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_open = True
        self._is_waiting = False
        counter.on_close = self._resume
        for sock in self.sockets:
            sock.setblocking(False)
            sock.listen(backlog)
            self._loop.add_reader(sock, self._accept, sock)

    def close(self) -> None:
        """Accepts nothing any more. Connections go on."""
        self._is_open = False
        for sock in self.sockets:
            self._loop.remove_reader(sock)
            sock.close()

    async def wait_closed(self) -> None:
        """Returns when the connections that were being made have been made or dropped."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, sock: socket.socket) -> None:
        if not self._counter.make_room():
            self._pause()  # until a connection has ended
            return
        # No more than there is room for: whether a further one waits, for which another must go, the loop tells.
        for _ in range(min(ACCEPT_AT_ONCE, self._counter.room)):
            try:
                connection, _ = sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no file or memory is left
                log.warning("a connection cannot be accepted: %s", error.strerror)
                self._pause()
                self._loop.call_later(RETRY_SECONDS, self._resume)
                return
            self._counter.accepted()
            connection.setblocking(False)
            protocol = self._make_protocol()
            task = self._loop.create_task(self._connect(connection, protocol))
            # Soon, which is after the task's first step: one that is cancelled before it would never close anything.
            self._counter.waits(task, partial(self._loop.call_soon, _drop, task, protocol))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, connection: socket.socket, protocol: GuardedProtocol) -> None:
        """Gives a connection to its protocol, after its TLS handshake if there is one."""
        seconds = self._counter.limits.head_seconds if self._ssl is not None else None
        task = asyncio.current_task()
        try:
            await self._loop.connect_accepted_socket(
                lambda: protocol, connection, ssl=self._ssl, ssl_handshake_timeout=seconds
            )
        except (OSError, TimeoutError, asyncio.CancelledError):
            with suppress(OSError):
                connection.close()
        finally:
            if protocol.transport is None:
                self._counter.closed(task)
            else:
                self._counter.works(task)

    def _pause(self) -> None:
        self._is_waiting = True
        for sock in self.sockets:
            self._loop.remove_reader(sock)

    def _resume(self) -> None:
        if self._is_waiting and self._is_open:
            self._is_waiting = False
            for sock in self.sockets:
                self._loop.add_reader(sock, self._accept, sock)


def _drop(task: asyncio.Task[None], protocol: GuardedProtocol) -> None:
    """Closes a connection that is being made, or has just been."""
    if protocol.transport is None:
        task.cancel()
    else:
        protocol.transport.abort()
