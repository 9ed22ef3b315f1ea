"""A layer of Serve's proxies: request ids by the rule of one server. Serve's own layer repeats what a client sends."""

from __future__ import annotations

from collections.abc import MutableMapping

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from dpn_rt.ray_serve.messages import REQUEST_ID_HEADER
from dpn_rt.server.access import checked_request_id

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Names `layers` to the proxies of a cluster that is started with it in its environment."""
CALLBACK = "dpn_rt.ray_serve.proxy:layers"


class RequestIdLayer:
    """Gives every request one id: the client's, or a new one where that has none or not the form of an id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(_with_id(scope) if "headers" in scope else scope, receive, send)


def layers() -> list[Middleware]:
    """Called by the proxies; they put their own layers inside of these."""
    return [Middleware(RequestIdLayer)]


def use_in(environment: MutableMapping[str, str]) -> None:
    """Lets the proxies of a cluster that is started next call `layers`, unless they have something else to call."""
    environment.setdefault(CALLBACK_VARIABLE, CALLBACK)


def _with_id(scope: Scope) -> Scope:
    given = [value for name, value in scope["headers"] if name.lower() == REQUEST_ID_HEADER]
    request_id = checked_request_id(given[-1] if given else b"").encode()
    others = [header for header in scope["headers"] if header[0].lower() != REQUEST_ID_HEADER]
    return {**scope, "headers": [*others, (REQUEST_ID_HEADER, request_id)]}
