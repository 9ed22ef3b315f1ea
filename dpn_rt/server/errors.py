"""Errors as HTTP replies: a status, and a body in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from dpn_rt.errors import CapacityError, DpnError, PromptTooLongError, RequestError, ShutdownError
from dpn_rt.server.body_errors import describe
from dpn_rt.server.media.policy import MediaTooLargeError

RETRY_AFTER = 1
"""Seconds that an overloaded server asks clients to wait."""


class HttpError(DpnError):
    """A request is refused before it reaches the engine."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})


class OverloadedError(HttpError):
    """There is no room now: 429, or 503 while the server shuts down."""

    def __init__(self, message: str, status: int = 429) -> None:
        super().__init__(status, message, code="overloaded")


@dataclass(frozen=True)
class ErrorReply:
    """An HTTP reply that reports an error."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "overloaded_error",
}


def error_reply(error: BaseException) -> ErrorReply:
    """The reply for any exception. For an unexpected one it names only the type."""
    if isinstance(error, HttpError):
        reply = _reply(error.status, str(error), error.param, error.code)
        return replace(reply, headers={**reply.headers, **error.headers})
    if isinstance(error, ValidationError):
        place, message = describe(error)
        return _reply(400, message, place)
    if isinstance(error, MediaTooLargeError):
        return _reply(413, str(error), error.field)
    if isinstance(error, RequestError):
        code = "context_length_exceeded" if isinstance(error, PromptTooLongError) else None  # by which clients know it
        return _reply(400, str(error), error.field, code)
    if isinstance(error, CapacityError):
        return _reply(400, str(error))
    if isinstance(error, ShutdownError):
        return _reply(503, str(error), code="overloaded")
    if isinstance(error, DpnError):
        return _reply(500, str(error))
    return _reply(500, f"internal error ({type(error).__name__}); the server's log has it under the request's id")


def _reply(status: int, message: str, param: str | None = None, code: str | None = None) -> ErrorReply:
    body = {"message": message, "type": ERROR_TYPES.get(status, "server_error"), "param": param, "code": code}
    headers = {"Retry-After": str(RETRY_AFTER)} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return ErrorReply(status, {"error": body}, headers)
