"""A layer that every request passes: its host, id, key, the size of its body, errors that nothing has foreseen."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import uuid
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dpn_rt.errors import ShutdownError
from dpn_rt.server.bodies import BodyLimits
from dpn_rt.server.errors import HttpError, error_reply
from dpn_rt.server.hosts import AllowedHosts

OPEN_PATHS = ("/health",)
"""Answered without a key, for supervisors and load balancers."""
WEBSOCKET_REFUSED = 403
"""What a client gets whose handshake is refused: ASGI leaves no choice."""
log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class AccessMiddleware:
    """Plain ASGI: streams pass through it chunk by chunk."""

    def __init__(
        self,
        app: ASGIApp,
        hosts: AllowedHosts,
        api_key: str | None,
        bodies: BodyLimits,
        on_refusal: Callable[[int], None],
    ) -> None:
        """Args: on_refusal: called with the status of each request that is refused here."""
        self._app, self._hosts, self._bodies, self._on_refusal = app, hosts, bodies, on_refusal
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there is nothing to talk about, with or without a key
            self._on_refusal(WEBSOCKET_REFUSED)
            await send({"type": "websocket.close", "code": 1008, "reason": "expected HTTP, not a WebSocket"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id = checked_request_id(headers.get(b"x-request-id", b""))
        scope.setdefault("state", {})["request_id"] = request_id

        reply = _Reply(send, request_id)
        try:
            self._hosts.check(scope)
            self._check_key(scope["path"], headers)
            with self._bodies.enter(headers.get(b"content-length", b"")) as body:
                await self._app(scope, body.limited(receive), reply.send)
        except HttpError as error:
            self._on_refusal(error.status)
            await reply.end_with(error)
        except ClientDisconnect:
            log.info("request %s: the client left while it sent its body", request_id)
        except asyncio.CancelledError:  # by the server, at its end
            await reply.end_with(ShutdownError("the server has ended, and this request with it"))
        except Exception as error:
            # Answered here, since the framework would close the connection, whose next request then fails as well.
            log.error("request %s: internal error", request_id, exc_info=error)
            self._on_refusal(500)
            await reply.end_with(error)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._api_key is None or path in OPEN_PATHS:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not secrets.compare_digest(key.strip(), self._api_key):
            message = "the API key is missing or wrong: expected Authorization: Bearer ..."
            raise HttpError(401, message, code="invalid_api_key")


class _Reply:
    """What has been sent of a reply, to end it in the right form."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._id = send, request_id.encode()
        self._has_begun = self._is_stream = self._has_ended = False

    async def send(self, message: Message) -> None:
        """Sends a part of the reply, with the request's id."""
        if message["type"] == "http.response.start":
            self._has_begun = True
            self._is_stream = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            message = {**message, "headers": [*message["headers"], (b"x-request-id", self._id)]}
        else:
            self._has_ended = not message.get("more_body", False)
        await self._send(message)

    async def end_with(self, error: BaseException) -> None:
        """An error as the reply, or as the last event of a stream that has begun."""
        reply = error_reply(error)
        body = json.dumps(reply.body).encode()
        if not self._has_begun:
            headers = {"content-type": "application/json", "content-length": str(len(body)), **reply.headers}
            encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
            await self.send({"type": "http.response.start", "status": reply.status, "headers": encoded})
            await self.send({"type": "http.response.body", "body": body})
        elif self._is_stream and not self._has_ended:
            await self.send({"type": "http.response.body", "body": b"data: %b\n\ndata: [DONE]\n\n" % body})


def checked_request_id(given: bytes) -> str:
    """The id of a request: what its header says, or a new one where that is no id."""
    text = given.decode("latin-1")
    return text if _REQUEST_ID.fullmatch(text) else uuid.uuid4().hex
