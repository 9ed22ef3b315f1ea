"""Bytes to a server, and what comes back."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tests.server.conftest import RunningServer


@contextmanager
def connected(server: RunningServer) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def exchange(server: RunningServer, sent: bytes) -> bytes:
    """The server's answer to bytes that end with its closing the connection."""
    with connected(server) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(sent)
        return read_all(connection)


def status(answer: bytes) -> int:
    """Of the first reply."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def error(answer: bytes) -> dict[str, Any]:
    """The error in OpenAI's form."""
    found = json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return dict(found)


def post(body: Any, *, path: str = "/v1/chat/completions", close: bool = True) -> bytes:
    """The bytes of a request."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    end = b"Connection: close\r\n" if close else b""
    fields = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return f"POST {path} HTTP/1.1\r\n{fields}".encode() + end + b"\r\n" + content
