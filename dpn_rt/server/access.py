"""A layer that every request passes: its id, the API key, the limit of its body, errors that nothing has foreseen."""

from __future__ import annotations

import json
import logging
import re
import secrets
import uuid
from collections.abc import Callable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dpn_rt.server.bodies import BodyLimits
from dpn_rt.server.errors import HttpError, error_reply

OPEN_PATHS = ("/health",)
"""Answered without a key, for supervisors and load balancers."""
log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class AccessMiddleware:
    """Plain ASGI: streams pass through it chunk by chunk."""

    def __init__(
        self, app: ASGIApp, api_key: str | None, bodies: BodyLimits, on_refusal: Callable[[int], None]
    ) -> None:
        """Args: on_refusal: called with the status of each request that is refused here."""
        self._app, self._bodies, self._on_refusal = app, bodies, on_refusal
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id = _request_id(headers.get(b"x-request-id", b""))
        scope.setdefault("state", {})["request_id"] = request_id

        has_begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            with self._bodies.enter(headers.get(b"content-length", b"")) as body:
                await self._app(scope, body.limited(receive), send_with_id)
        except HttpError as error:
            self._on_refusal(error.status)
            await _send_error(error, send_with_id)
        except ClientDisconnect:
            log.info("request %s: the client left while it sent its body", request_id)
        except Exception as error:
            # Answered here, since the framework would close the connection, whose next request then fails as well.
            if has_begun:
                raise
            log.error("request %s: internal error", request_id, exc_info=error)
            self._on_refusal(500)
            await _send_error(error, send_with_id)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._api_key is None or path in OPEN_PATHS:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not secrets.compare_digest(key.strip(), self._api_key):
            raise HttpError(401, "the API key is missing or wrong: expected Authorization: Bearer ...")


def _request_id(given: bytes) -> str:
    text = given.decode("latin-1")
    return text if _REQUEST_ID.fullmatch(text) else uuid.uuid4().hex


async def _send_error(error: Exception, send: Any) -> None:
    reply = error_reply(error)
    body = json.dumps(reply.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **reply.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
