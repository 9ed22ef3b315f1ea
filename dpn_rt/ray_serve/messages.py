"""A request on its way to a replica, and its reply on the way back: ASGI's, without what belongs to one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope

REPLICA_HEADER = b"x-dpn-rt-replica"
"""Of a reply: the replica that made it."""
REQUEST_ID_HEADER = b"x-request-id"
_SENT = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")


@dataclass(frozen=True)
class ForwardedRequest:
    """A request with its whole body."""

    scope: dict[str, Any]
    body: bytes

    @classmethod
    async def read(cls, scope: Scope, receive: Receive) -> ForwardedRequest:
        """Reads the body of a request. Its id is the one that was given to it here.

        Raises:
            ClientDisconnect: the client left meanwhile; and what `receive` raises.
        """
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        sent = {name: scope[name] for name in _SENT if name in scope}
        sent["headers"] = [(name, value) for name, value in scope["headers"] if name.lower() != REQUEST_ID_HEADER]
        sent["headers"].append((REQUEST_ID_HEADER, scope["state"]["request_id"].encode()))
        return cls(sent, bytes(body))


async def respond(app: ASGIApp, request: ForwardedRequest) -> AsyncGenerator[list[Message], None]:
    """Runs an application on a request.

    Closing the generator tells the application that the client has left.

    Yields:
        Parts of the reply, those together that are ready at the same time; the first has the status and content.
    """
    parts: asyncio.Queue[Message | None] = asyncio.Queue()
    left = asyncio.Event()
    bodies = iter([{"type": "http.request", "body": request.body, "more_body": False}])

    async def receive() -> Message:
        for message in bodies:
            return message
        await left.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app({**request.scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}, receive, parts.put)
        finally:
            parts.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        async for ready in _batches(parts):
            yield ready
        await task  # raises what the application has raised
    finally:
        left.set()
        await asyncio.sleep(0)  # the application may end by itself
        task.cancel()
        with suppress(BaseException):
            await task


async def _batches(parts: asyncio.Queue[Message | None]) -> AsyncGenerator[list[Message], None]:
    """What the queue has, until None."""
    ready: list[Message] = []
    while (part := await parts.get()) is not None:
        ready.append(part)
        # The status waits for content: until then another replica can answer.
        if parts.empty() and part["type"] != "http.response.start":
            yield ready
            ready = []
    if ready:
        yield ready
