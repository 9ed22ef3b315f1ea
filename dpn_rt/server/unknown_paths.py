"""What the server says about paths and methods that it does not have."""

from __future__ import annotations

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from dpn_rt.server.errors import HttpError

_CHAT = "use /v1/chat/completions"
NOT_HERE = {
    "/v1/responses": f"the Responses API is not supported, {_CHAT}",
    "/v1/messages": f"Anthropic's API is not supported, {_CHAT}",
    "/v1/embeddings": "the model makes text, not embeddings",
    "/generate": f"not a path of this server, {_CHAT} or /v1/completions",
    "/invocations": f"not a path of this server, {_CHAT} or /v1/completions",
}
"""Paths of other servers and APIs, with all below them -> what to do instead."""


def in_own_words(error: HTTPException, request: Request) -> HttpError:
    """The error that the framework raises for a path or method, with the server's own text."""
    path = request.url.path
    if error.status_code == 404:
        return HttpError(404, f"path {path!r:.80}: {_instead(path, request)}", code="unknown_path")
    if error.status_code == 405:
        allowed = _methods(request)
        message = f"{request.method[:20]} {path!r:.80}: expected the method {' or '.join(allowed)}"
        return HttpError(405, message, headers={"Allow": ", ".join(allowed)})
    return HttpError(error.status_code, f"{request.method[:20]} {path!r:.80}: cannot be answered")


def _instead(path: str, request: Request) -> str:
    for known, text in NOT_HERE.items():
        if path == known or path.startswith(f"{known}/"):
            return text
    paths = [route.path for route in request.app.routes if isinstance(route, APIRoute) and route.include_in_schema]
    return f"not a path of this server, expected one of {', '.join(paths)}"


def _methods(request: Request) -> list[str]:
    """The methods that the path of a request has."""
    methods = {
        method
        for route in request.app.routes
        if hasattr(route, "path_regex") and route.path_regex.match(request.url.path)
        for method in route.methods or ()
    }
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))
