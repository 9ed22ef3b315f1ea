"""What every request passes first: its id, the API key, the body's limit."""

from __future__ import annotations

import json
import re
import secrets
import uuid
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dpn_rt.server.bodies import BodyLimits
from dpn_rt.server.errors import HttpError, reply

OPEN_PATHS = ("/health",)
"""Answered without a key: supervisors and load balancers ask."""
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class AccessMiddleware:
    """Plain ASGI, so that streams pass untouched."""

    def __init__(self, app: ASGIApp, api_key: str | None, bodies: BodyLimits, refused: Callable[[int], None]) -> None:
        """Args: refused: told the status of each request that gets no further than here."""
        self._app, self._bodies, self._refused = app, bodies, refused
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id = _request_id(headers.get(b"x-request-id", b""))
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            with self._bodies.enter(headers.get(b"content-length", b"")) as body:
                await self._app(scope, body.limited(receive), send_with_id)
        except HttpError as error:
            self._refused(error.status)
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


async def _send_error(error: HttpError, send: Any) -> None:
    answer = reply(error)
    body = json.dumps(answer.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **answer.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
