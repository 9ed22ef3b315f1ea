"""Connections that come all at once: as many as may be open stay, the oldest silent ones go, and none is forgotten."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import ExitStack
from typing import Any, cast

import pytest

from dpn_rt.server.connections import ConnectionCounter, ConnectionLimits
from dpn_rt.server.listener import Listener


class Silent(asyncio.Protocol):
    """Waits for a request, as the server's own protocol does."""

    transport: asyncio.Transport | None = None

    def __init__(self, counter: ConnectionCounter) -> None:
        self._counter = counter

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._counter.waits(self, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._counter.closed(self)


@pytest.mark.parametrize("count", [1, 6, 7, 12, 13, 50])
def test_a_burst_of_silent_connections(count: int) -> None:
    asyncio.run(burst(count))


async def burst(count: int) -> None:
    counter = ConnectionCounter(ConnectionLimits(max_connections=4, reserve=2))
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0), backlog=64) as bound:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(bound.getsockname()))

        clients = [connect() for _ in range(count)]  # before any is accepted
        protocols: list[Silent] = []

        def make_protocol() -> Any:
            protocols.append(Silent(counter))
            return protocols[-1]

        listener = Listener([bound], make_protocol, counter, None, 64)
        most = min(count, 6)
        await until(lambda: len(protocols) == count and counter.open == most and counter.busy == 0)
        assert sum(map(is_open, clients)) == most
        clients.append(connect())
        most = min(count + 1, 6)
        await until(lambda: len(protocols) == count + 1 and counter.open == most and counter.busy == 0)
        assert sum(map(is_open, clients)) == most and is_open(clients[-1])
        listener.close()
        for client in clients:
            client.close()
        await until(lambda: counter.open == 0)


def is_open(client: socket.socket) -> bool:
    """Whether the server has not closed it."""
    client.setblocking(False)
    try:
        return bool(client.recv(1))
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


async def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it has not come about"
        await asyncio.sleep(0.01)
