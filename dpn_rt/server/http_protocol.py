"""A connection: uvicorn's protocol with bounds on the head of a request, on silence, and on what is answered."""

from __future__ import annotations

import asyncio
import json
import select
from collections.abc import Callable
from typing import Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from dpn_rt.server.connections import ConnectionCounter
from dpn_rt.server.errors import HttpError, error_reply

OPEN_PATH = b"/health"
"""Answered when nothing else is."""
MAX_PIPELINED = 16
"""Requests of one connection that wait for an answer."""
FRAMING_BYTES_PER_BYTE = 16
"""Of a chunked body: bytes around a byte of it. Chunks of one byte have five."""
PROBE_SECONDS = 0.2
"""Between two looks at whether a client that has ended its side has gone altogether."""
LINGER_SECONDS = 1.0
"""For a client to read a refusal while it still sends."""
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class GuardedProtocol(HttpToolsProtocol):
    """Closes a connection whose request line and headers are too large, or whose client is silent in a request.

    Refusals have OpenAI's form. A client that ends its side after a request still gets the answer.
    """

    def __init__(
        self,
        counter: ConnectionCounter,
        count_refusal: Callable[[int], None],
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        super().__init__(config, server_state, app_state, loop)
        self._counter, self._limits, self._count_refusal = counter, counter.limits, count_refusal
        self._in_head = self._in_body = False
        self._head_bytes = self._num_headers = self._body_bytes = self._framing_bytes = self._body_in_data = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._refusal: HttpError | None = None
        self._is_refused = self._has_cycle = False
        self._running: RequestResponseCycle | None = None

    # What asyncio calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._counter.waits(self, transport.abort)
        self._arm(self._limits.head_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._disarm()
        self._reading_again()
        self._unset_keepalive_if_required()
        self._counter.closed(self)
        for cycle in (self._running, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        was_in_head, self._body_in_data = self._in_head, 0
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._is_refused or self.transport.is_closing():
            return
        if self._in_head and was_in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.max_head_bytes:
                self._refuse(self._head_too_large())
        elif self._in_body:
            self._framing_bytes += len(data) - self._body_in_data
            allowed = self._limits.max_head_bytes + len(data) + FRAMING_BYTES_PER_BYTE * self._body_bytes
            if self._framing_bytes > allowed:
                self._refuse(
                    HttpError(400, f"a chunked body of {self._body_bytes} bytes in {self._framing_bytes} others")
                )
        elif not self._is_answering and self._deadline is None:  # line ends between two requests
            self._arm(self._limits.head_seconds, self._head_is_late)

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that has sent whole requests may end its side and wait for the answers."""
        if self._is_refused or self._in_head or self._in_body or not self._is_answering or self.scheme == "https":
            return False
        self.cycle.keep_alive = False
        if self.scope["http_version"] == "1.1" and self._running is not None and not self._running.response_started:
            # A client that has gone altogether answers these bytes with a reset. Others skip them (RFC 9110, 15.2).
            self.transport.write(CONTINUE)
        self._arm(PROBE_SECONDS, self._look_for_reset)
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline = self.loop.call_later(self._limits.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reading_again()

    # What the parser calls.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._has_cycle = True, False
        self._head_bytes = self._num_headers = self._body_bytes = self._framing_bytes = 0
        if self.cycle is not None:  # the time of the first request began with the connection
            self._arm(self._limits.head_seconds, self._head_is_late)

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._count_head(len(name) + len(value) + 4)
        if self._num_headers > self._limits.max_headers:
            self._refusal = HttpError(431, f"more than {self._limits.max_headers} headers: expected at most so many")
            raise self._refusal
        if self._in_head:  # not after a body, where nothing reads them
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():  # `_parse` gives the parser this request again
            return
        self._in_head, self._in_body = False, True
        self._counter.works(self)
        self._arm(self._limits.body_seconds, self._check_progress, self._body_bytes)
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refusal = HttpError(400, f"more than {MAX_PIPELINED} requests before the first answer")
            raise self._refusal
        if self._counter.busy > self._counter.max_busy and self.url.partition(b"?")[0] != OPEN_PATH:
            message = f"{self._counter.busy} requests are sent or answered: expected at most {self._counter.max_busy}"
            self._refusal = HttpError(503, message, code="overloaded")
            raise self._refusal
        super().on_headers_complete()
        self._has_cycle = True
        self.flow.resume_reading()  # paused for a request that has to wait: its client could leave unseen

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._body_in_data += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_body = False
        self._disarm()
        super().on_message_complete()
        if self.cycle.response_complete:  # before its body had come
            self._counter.waits(self, self.transport.abort)

    # What uvicorn calls.

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app if cycle.scope["http_version"] == "1.1" else _without_chunks(cycle, app))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing() or self._is_answering:
            return
        if self._in_body:  # refused before its body had come
            self._arm(self._limits.body_seconds, self.transport.close)
        else:
            self._counter.waits(self, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Instead of plain text. Called for whatever the parser does not take."""
        self._refuse(self._refusal or HttpError(400, "not HTTP/1.1: expected a request line, headers and a body"))

    # Own parts.

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            (offset,) = upgrade.args
            self._parse_without_upgrade(data[offset:])
        except httptools.HttpParserError:
            self.send_400_response("")

    def _parse_without_upgrade(self, rest: bytes) -> None:
        """Takes a request as if its client had not offered another protocol, as RFC 9110 (7.8) allows.

        The parser ends at such a request, and takes neither its body nor the requests after it.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(HttpError(400, "CONNECT is for proxies, expected GET or POST"))
            return
        version = self.parser.get_http_version().encode()
        kept = [(name, value) for name, value in self.headers if name not in (b"connection", b"upgrade")]
        kept += [(b"connection", options) for name, value in self.headers if (options := _other_options(name, value))]
        lines = [b"%s %s HTTP/%s\r\n" % (method, self.url, version), *(b"%s: %s\r\n" % header for header in kept)]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self._parse(b"".join([*lines, b"\r\n", rest]))

    @property
    def _is_answering(self) -> bool:
        return bool(self.pipeline) or (self._running is not None and not self._running.response_complete)

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self._limits.max_head_bytes:
            self._refusal = self._head_too_large()
            raise self._refusal

    def _head_too_large(self) -> HttpError:
        limit = self._limits.max_head_bytes
        return HttpError(431, f"the request line and headers have more than {limit} bytes: expected at most so many")

    def _refuse(self, error: HttpError) -> None:
        """Answers outside of the application, after the answers to earlier requests, and closes the connection."""
        if self._is_refused:
            return
        self._is_refused = True
        self._disarm()
        self.logger.info("connection of %s: %d %s", self.client, error.status, error)
        self._count_refusal(error.status)
        refused = self.cycle if self._has_cycle else None
        if self.pipeline and self.pipeline[0][0] is refused:
            self.pipeline.popleft()
        if self._is_answering and self._running is not refused:  # what is right still gets its answer
            last = self.pipeline[0][0] if self.pipeline else self._running
            assert last is not None
            last.keep_alive = False
            return
        if refused is None or not refused.response_started:
            self.transport.write(_reply(error))
        if refused is not None and not refused.response_complete:
            refused.disconnected = True
            refused.message_event.set()
        self._linger()

    def _linger(self) -> None:
        """Closes the connection, but not before its client can have read. Unread bytes would reset it at once."""
        self._counter.waits(self, self.transport.abort)
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.flow.resume_reading()
            self._arm(LINGER_SECONDS, self.transport.close)
        else:
            self.transport.close()

    def _head_is_late(self) -> None:
        if not self._in_head:  # nothing was asked, so nothing is answered
            self.transport.close()
            return
        seconds = self._limits.head_seconds
        self._refuse(HttpError(408, f"the request line and headers took more than {seconds:g} s: expected less"))

    def _check_progress(self, bytes_before: int) -> None:
        """Called while a body is being received, `body_seconds` after it had `bytes_before` bytes."""
        if self._body_bytes - bytes_before < self._limits.min_body_bytes and not self.flow.read_paused:
            limits = self._limits
            expected = f"expected at least {limits.min_body_bytes} in {limits.body_seconds:g} s"
            self._refuse(HttpError(408, f"{self._body_bytes - bytes_before} bytes of the body have come: {expected}"))
        else:
            self._arm(self._limits.body_seconds, self._check_progress, self._body_bytes)

    def _look_for_reset(self) -> None:
        """The event loop watches no connection whose client has ended its side."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket"), 0)
        if poll.poll(0):
            self.transport.abort()
        else:
            self._arm(PROBE_SECONDS, self._look_for_reset)

    def _reading_again(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _arm(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, action, *arguments)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _without_chunks(cycle: RequestResponseCycle, app: ASGIApp) -> Any:
    """The application for a client of HTTP/1.0, which knows no chunks: an answer without a length ends with the
    connection."""
    cycle.keep_alive = cycle.waiting_for_100_continue = False

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        is_open = False

        async def send_plain(message: Message) -> None:
            nonlocal is_open
            if message["type"] == "http.response.start":
                is_open = all(name.lower() != b"content-length" for name, _ in message["headers"])
                cycle.chunked_encoding = False if is_open else None
            elif is_open:  # uvicorn takes as much as has been announced
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return answer


def _other_options(name: bytes, value: bytes) -> bytes:
    """What a `Connection` header has beside `upgrade`; empty for other headers."""
    options = [option.strip() for option in value.split(b",")] if name == b"connection" else []
    return b", ".join(option for option in options if option and option.lower() != b"upgrade")


def _reply(error: HttpError) -> bytes:
    """A whole reply."""
    reply = error_reply(error)
    body = json.dumps(reply.body).encode()
    headers = {**reply.headers, "content-type": "application/json", "content-length": len(body), "connection": "close"}
    lines = [f"{name.lower()}: {value}\r\n".encode() for name, value in headers.items()]
    return b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body])
