"""What holds for all paths alike: HEAD where there is GET, and a path with a slash at its end."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class UniformMiddleware:
    """Answers HEAD as GET without the body (RFC 9110, 9.3.2), and `/v1/models/` as `/v1/models`.

    FastAPI would redirect the latter, which clients that do not follow redirects of POST take for an error.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].rstrip("/") or "/"
        if path != scope["path"]:
            scope = {**scope, "path": path, "raw_path": path.encode("utf-8", "surrogatepass")}
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, send_head)
