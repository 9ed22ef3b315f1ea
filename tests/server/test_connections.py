"""Heads that are too large, clients that are silent, half closed or too many are bounded, and others are served."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from dpn_rt.errors import ConfigError
from dpn_rt.server.connections import ConnectionLimits, within_open_files
from tests.server.conftest import Ask, RunningServer, StartServer
from tests.server.raw_http import connected, error, exchange, post, read_all, status

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
QUICK = ConnectionLimits(head_seconds=0.3, body_seconds=0.3, keep_alive_seconds=0.3, unread_seconds=0.3)
MEGABYTE = b"x" * 2**20

HEADS = {
    "one header of 96 MB": GET + b"X: " + MEGABYTE * 96,
    "one header of 70 kB": GET + b"X: " + b"x" * 70_000 + b"\r\n\r\n",
    "a header's name of 70 kB": GET + b"x" * 70_000 + b": 1\r\n\r\n",
    "many headers of 10 kB": GET + b"".join(b"X%d: %b\r\n" % (i, b"x" * 10_000) for i in range(8)) + b"\r\n",
    "20,000 headers": GET + b"X: 1\r\n" * 20_000 + b"\r\n",
    "101 headers": GET + b"X: 1\r\n" * 100 + b"\r\n",
    "an unfinished request line of 32 MB": b"GET /" + MEGABYTE * 32,
    "a query of 70 kB": b"GET /health?" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_too_large_is_refused_before_anything_else(start_server: StartServer, name: str) -> None:
    server = start_server(api_key="secret")
    answer = exchange(server, HEADS[name])
    assert status(answer) == 431 and error(answer)["type"] == "invalid_request_error"
    assert b"connection: close" in answer.lower()
    assert server.client.get("/health").status_code == 200


def test_a_head_within_the_limits_is_served(server: RunningServer) -> None:
    fields = b"X: 1\r\n" * 97 + b"Y: " + b"y" * 60_000 + b"\r\nConnection: close\r\n\r\n"
    assert status(exchange(server, GET + fields)) == 200


CHUNKED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        (b"1;" + MEGABYTE * 8, 400),
        (b"0\r\nX: " + MEGABYTE * 8, 400),
        (b"0\r\n" + b"X: 1\r\n" * 200 + b"\r\n", 431),
    ],
    ids=["a chunk's extension", "a trailer", "trailers"],
)
def test_what_stands_around_a_chunked_body_is_bounded(server: RunningServer, rest: bytes, expected: int) -> None:
    assert status(exchange(server, CHUNKED + rest)) == expected


def test_a_body_in_chunks_of_a_byte_is_read(server: RunningServer) -> None:
    body = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"model": "other", "messages": []}' + b" " * 100_000)
    assert (
        status(exchange(server, CHUNKED.replace(b"Transfer", b"Connection: close\r\nTransfer") + body + b"0\r\n\r\n"))
        == 400
    )


UPGRADE = {
    "HTTP/2": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n",
    "a web socket": b"Upgrade: websocket\r\nConnection: keep-alive, upgrade\r\nSec-WebSocket-Version: 13\r\n",
    "anything": b"connection: upgrade\r\nupgrade: x\r\n",
}


@pytest.mark.parametrize("name", UPGRADE)
@pytest.mark.parametrize("apart", [True, False])
def test_an_offer_of_another_protocol_is_not_taken(server: RunningServer, name: str, apart: bool) -> None:
    """The body is the body, also where it looks like a request, and requests after it are answered."""
    head, body = post(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n", close=False).split(b"\r\n\r\n", 1)
    chunked = CHUNKED.removesuffix(b"\r\n") + UPGRADE[name] + b"\r\n"
    parts = [
        head + b"\r\n" + UPGRADE[name] + b"\r\n",
        body,
        chunked + b"2\r\n{}\r\n",
        b"0\r\n\r\n",
        GET + UPGRADE[name] + b"\r\n",
        GET + b"Connection: close\r\n\r\n",
    ]
    with connected(server) as connection:
        for part in parts if apart else [b"".join(parts)]:
            connection.sendall(part)
            time.sleep(0.05 if apart else 0)
        answers = read_all(connection)
    found = [int(number) for number in re.findall(rb"HTTP/1\.1 (\d+)", answers)]
    assert found == [400, 400, 200, 200]
    assert b'"version"' not in answers


def test_what_follows_the_last_request_is_ignored_with_an_offer_and_without(server: RunningServer) -> None:
    for fields in (b"Connection: close\r\n", b"Connection: close, upgrade\r\nUpgrade: h2c\r\n"):
        assert status(exchange(server, GET + fields + b"\r\n" + GET + b"\r\n")) == 200


def test_a_tunnel_is_refused(server: RunningServer) -> None:
    answer = exchange(server, b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert status(answer) == 400 and "CONNECT is for proxies" in error(answer)["message"]


def test_an_older_client_gets_no_chunks(server: RunningServer) -> None:
    """HTTP/1.0 has neither chunks nor `100 Continue` (RFC 9112, 6.1; RFC 9110, 10.1.1): a stream ends with its
    connection."""
    more = b" HTTP/1.0\r\nExpect: 100-continue\r\nConnection: keep-alive\r\n"
    for stream in (True, False):
        sent = post(Ask().body(stream=stream), close=False).replace(b" HTTP/1.1\r\n", more, 1)
        head, _, content = exchange(server, sent).partition(b"\r\n\r\n")
        assert status(head) == 200 and b"transfer-encoding" not in head.lower()
        assert (b"content-length" in head.lower()) != stream
        if stream:
            assert content.startswith(b"data: {") and content.endswith(b"data: [DONE]\n\n")
        else:
            assert json.loads(content)["choices"]


def test_refusals_of_connections_are_counted(start_server: StartServer) -> None:
    server = start_server()
    assert status(exchange(server, HEADS["101 headers"])) == 431
    assert status(exchange(server, b"no request\r\n\r\n")) == 400
    counts = server.client.get("/metrics").text
    for refused in (431, 400):
        assert f'request_refused_total{{model_name="tiny",status="{refused}"}} 1.0' in counts


def silent(sent: bytes) -> Callable[[socket.socket], bytes]:
    def act(connection: socket.socket) -> bytes:
        connection.sendall(sent)
        return read_all(connection)

    return act


def byte_by_byte(sent: bytes) -> Callable[[socket.socket], bytes]:
    def act(connection: socket.socket) -> bytes:
        connection.settimeout(0.02)
        for byte in sent * 1000:
            try:
                connection.send(bytes([byte]))
                if answer := connection.recv(65536):
                    return answer
                return b""
            except TimeoutError:
                continue
            except ConnectionError:
                return b""
        raise AssertionError("the connection stays open")

    return act


BODY = post(b"x" * 100_000).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
SILENCES = {
    "nothing": (silent(b""), 0),
    "half a request line": (silent(b"GET /hea"), 408),
    "half of the headers": (silent(GET), 408),
    "no body": (silent(BODY), 408),
    "half of a body": (silent(BODY + b"x" * 50_000), 408),
    "half of a chunked body": (silent(CHUNKED + b"5\r\nabc"), 408),
    "nothing after an answer": (silent(GET + b"\r\n"), 200),
    "line ends after an answer": (silent(GET + b"\r\n\r\n\r\n"), 200),
    "headers a byte at a time": (byte_by_byte(b"GET / HTTP/1.1\r\nHost: a\r\nX: 1" + b"1" * 1000), 408),
    "line ends a byte at a time": (byte_by_byte(b"\r\n"), 0),
}


@pytest.mark.parametrize("name", SILENCES)
def test_a_client_that_is_silent_is_dropped(start_server: StartServer, name: str) -> None:
    server = start_server(connections=QUICK)
    act, expected = SILENCES[name]
    with connected(server) as connection:
        answer = act(connection)
    assert status(answer) == expected
    if expected == 408:
        assert error(answer)["message"]
    server.wait_until_idle()
    assert server.server.connections.busy == 0


def test_a_client_that_does_not_read_is_dropped(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server(connections=QUICK)
    with connected(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(200):  # replies of some kB each, until every buffer is full
            try:
                connection.settimeout(0.2)
                connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
            except OSError:
                break
        until(lambda: server.server.connections.open == 0)


def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come about"
        time.sleep(0.01)


def test_silent_connections_make_room_for_others(start_server: StartServer) -> None:
    server = start_server(connections=ConnectionLimits(max_connections=4, reserve=2))
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(connected(server))
        for _ in range(5):
            assert status(exchange(server, GET + b"Connection: close\r\n\r\n")) == 200
        assert status(exchange(server, post(Ask().body()))) == 200
        assert server.server.connections.open <= 6


def test_a_place_is_kept_for_health(start_server: StartServer) -> None:
    server = start_server(connections=ConnectionLimits(max_connections=2, reserve=2))
    server.client.close()
    until(lambda: server.server.connections.open == 0)
    with connected(server) as one, connected(server) as two:
        for connection in (one, two):
            connection.sendall(BODY + b"x")
        until(lambda: server.server.connections.busy == 2)
        answer = exchange(server, b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert status(answer) == 503 and "expected at most 2" in error(answer)["message"]
        assert status(exchange(server, GET + b"Connection: close\r\n\r\n")) == 200
    until(lambda: server.server.connections.open == 0)
    assert status(exchange(server, b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")) == 200


def test_connections_fit_the_files_that_a_process_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    raised = []
    monkeypatch.setattr("resource.setrlimit", lambda _, limits: raised.append(limits))
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 1_000_000))
    assert within_open_files(ConnectionLimits(max_connections=3000)) == 3016
    assert raised[-1][0] > 3040
    monkeypatch.setattr("resource.getrlimit", lambda _: (300, 300))
    assert 4 <= within_open_files(ConnectionLimits()) < 300
    monkeypatch.setattr("resource.getrlimit", lambda _: (8, 8))
    with pytest.raises(ConfigError, match="may open 8 files"):
        within_open_files(ConnectionLimits())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_ends_its_side_is_answered(start_server: StartServer, stream: bool) -> None:
    server = start_server()
    with connected(server) as connection:
        connection.sendall(post(Ask().body(max_tokens=60, ignore_eos=True, stream=stream), close=False))
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    assert status(answer) == 200
    assert (b"[DONE]" if stream else b'"finish_reason":"length"') in answer
    server.wait_until_idle()


def test_a_client_that_leaves_while_it_waits_is_noticed(start_server: StartServer) -> None:
    server = start_server()
    with connected(server) as connection:
        connection.sendall(post(Ask().body(max_tokens=600, ignore_eos=True), close=False))
        until(lambda: server.service.engine.load.running)
    server.wait_until_idle(5)
    until(lambda: server.server.connections.busy == 0)


def test_requests_of_one_connection_are_answered_in_turn_and_end_with_it(start_server: StartServer) -> None:
    server = start_server()
    with connected(server) as connection:
        connection.sendall(post(Ask().body(max_tokens=2), close=False) * 2 + GET + b"Connection: close\r\n\r\n")
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    with connected(server) as connection:
        request = post(Ask().body(max_tokens=600, ignore_eos=True), close=False)
        connection.sendall(request)
        until(lambda: server.service.engine.load.running)
        connection.sendall(GET + b"\r\n" + request[:1000])
        time.sleep(0.1)
    until(lambda: server.server.connections.open <= 1)
    server.wait_until_idle(5)


def test_what_is_wrong_after_a_request_leaves_it_its_answer(start_server: StartServer) -> None:
    server = start_server()
    with connected(server) as connection:
        connection.sendall(post(Ask().body(), close=False) + b"nonsense\r\n\r\n")
        answer = read_all(connection)
    assert status(answer) == 200 and answer.count(b"HTTP/1.1") == 1


def test_more_requests_than_anyone_sends_at_once_are_refused(start_server: StartServer) -> None:
    server = start_server()
    with connected(server) as connection:
        connection.sendall(post(Ask().body(max_tokens=20, ignore_eos=True), close=False) + (GET + b"\r\n") * 100)
        answer = read_all(connection)
    assert status(answer) == 200 and answer.count(b"HTTP/1.1 200") <= 17


@pytest.mark.parametrize(
    "sent", [b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"G\0T / HTTP/1.1\r\n\r\n"]
)
def test_what_is_not_http_is_told_so_in_the_same_form(server: RunningServer, sent: bytes) -> None:
    answer = exchange(server, sent)
    assert status(answer) == 400 and "expected" in error(answer)["message"]
