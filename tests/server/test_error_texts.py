"""Errors are told in the server's own words: no text, name or object of a library, in replies and in the log."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dpn_rt.engine.engine import Engine, StepResult
from dpn_rt.engine.prefill import Prefill
from dpn_rt.server.cors import CorsPolicy
from dpn_rt.server.media.policy import MediaPolicy
from tests.server.conftest import MODEL, Ask, RunningServer, StartServer, data_url, png

GOOD = Ask()
LIBRARIES = re.compile(
    r"0x[0-9a-f]{6}|<[\w.]+ object|BytesIO|pydantic|errors\.pydantic|validation error|Input should|Extra inputs|"
    r"Field required|after validation|Invalid JSON|tagged-union|list\[|constrained|\[Errno|Incorrect padding|"
    r"Excess data|Only base64|Not Found|Method Not Allowed|httpx|httpcore|ssl\.c|no such luck|nothing left"
)


def part(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [fields]}]}


BODIES: dict[str, tuple[Any, str]] = {
    "no JSON": (b'{"model": ', "body: not valid JSON at line 1 column 10, expected an object"),
    "half a character": (b'{"model": "\\ud83d"}', "body: not valid JSON at line 1"),
    "other encoding": ('{"model": "é"}'.encode("latin-1"), "body: not valid JSON"),
    "nested": (b"[" * 10_000, "body: not valid JSON"),
    "list": ([], "body: expected an object, got a list"),
    "null": (None, "body: expected an object, got null"),
    "no model": ({"messages": GOOD.messages}, "model: missing, expected it in the request"),
    "no messages": ({"model": MODEL}, "messages: missing, expected it in the request"),
    "empty messages": (GOOD.body(messages=[]), "messages: 0 items, expected at least 1"),
    "messages as text": (GOOD.body(messages="Hello"), "messages: expected a list, got a string"),
    "message as text": (GOOD.body(messages=["Hello"]), "messages.0: expected an object, got a string"),
    "role": (GOOD.body(messages=[{"role": "tool", "content": "a"}]), "messages.0.role: 'tool', expected 'system', "),
    "long role": (GOOD.body(messages=[{"role": "r" * 500, "content": "a"}]), "messages.0.role: 'rrrr"),
    "content": (
        GOOD.body(messages=[{"role": "user", "content": 7}]),
        "messages.0.content: expected a string or a list, got 7",
    ),
    "part": (GOOD.body(**part(type="video_url")), "messages.0.content.0: type 'video_url', expected one of 'text', "),
    "part without type": (GOOD.body(**part(text="a")), 'messages.0.content.0: expected an object with a "type"'),
    "text": (GOOD.body(**part(type="text", text=["SECRET"])), "messages.0.content.0.text: expected a string, got"),
    "text as object": (
        GOOD.body(messages=[{"role": "user", "content": {"text": "SECRET"}}]),
        "messages.0.content: expected a string or a list, got an object",
    ),
    "url": (
        GOOD.body(**part(type="image_url", image_url={"url": 7})),
        "messages.0.content.0.image_url.url: expected a string, got 7",
    ),
    "max_tokens": (GOOD.body(max_tokens="8"), "max_tokens: expected an integer, got a string"),
    "no tokens": (GOOD.body(max_tokens=0), "max_tokens: 0, expected at least 1"),
    "fraction": (GOOD.body(max_tokens=1.5), "max_tokens: expected an integer, got 1.5"),
    "truth": (GOOD.body(temperature=True), "temperature: expected a number, got true"),
    "stream": (GOOD.body(stream="yes"), "stream: expected true or false, got a string"),
    "many": (GOOD.body(n=65), "n: 65, expected at most 64"),
    "stop strings": (GOOD.body(stop=["a"] * 17), "stop: 17 items, expected at most 16"),
    "stop": (GOOD.body(stop=7), "stop: expected a string or a list, got 7"),
    "stop tokens": (GOOD.body(stop_token_ids=[2**31]), "stop_token_ids.0: 2147483648, expected less than 2147483648"),
    "options": (GOOD.body(stream=True, stream_options=7), "stream_options: expected an object, got 7"),
    "route": (GOOD.body(route=["a"]), "route.0: expected an integer, got a string"),
    "type as object": (GOOD.body(**part(type={"a": "SECRET"})), "messages.0.content.0: type an object, expected one"),
    "long name": (GOOD.body(**{"x" * 5000: 1}), f"unknown or unsupported field {'x' * 39}…: expected"),
    "line in a name": (GOOD.body(**{"a\nb": 1}), "unknown or unsupported field 'a\\nb': expected"),
    "unknown": (GOOD.body(secret="SECRET"), "unknown or unsupported field secret: expected fields of OpenAI's API"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_what_is_wrong_with_a_body(server: RunningServer, caplog: pytest.LogCaptureFixture, name: str) -> None:
    body, expected = BODIES[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with heard(caplog):
        headers = {"Content-Type": "application/json"}
        reply = server.client.post("/v1/chat/completions", content=content, headers=headers)
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert message.startswith(expected)
    for text in (message, *caplog.messages):
        assert not LIBRARIES.search(text) and "SECRET" not in text and len(text) < 250


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"model": MODEL}, "prompt: missing"),
        ({"model": MODEL, "prompt": [1, "a"]}, "prompt.0: expected a string or a list, got 1"),
        ({"model": MODEL, "prompt": []}, "prompt: 0 items, expected at least 1"),
        ({"model": MODEL, "prompt": [2**40]}, "prompt.0: 1099511627776, expected less than"),
        ({"model": MODEL, "prompt": "a", "logprobs": 50}, "logprobs: 50, expected at most 20"),
    ],
)
def test_what_is_wrong_with_a_completion(server: RunningServer, body: Any, expected: str) -> None:
    message = server.post(body, "/v1/completions").json()["error"]["message"]
    assert message.startswith(expected) and not LIBRARIES.search(message)


@contextmanager
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What is logged meanwhile reaches `caplog`, once: pytest has given its handler to loggers that did not propagate
    when the test began, as after a server's logs were set up."""
    logger = logging.getLogger("dpn_rt")
    before = logger.propagate
    logger.propagate = before or caplog.handler not in logger.handlers
    try:
        with caplog.at_level(logging.INFO, "dpn_rt"):
            yield
    finally:
        logger.propagate = before


def jpeg() -> bytes:
    file = io.BytesIO()
    GOOD.image.save(file, "JPEG")
    return file.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8"/></svg>'
NO_IMAGES = [
    "data:image/png;base64,AAAA", data_url(b""), data_url(SVG, "image/svg+xml"), data_url(b"%PDF-1.7\n%%EOF"),
    data_url(jpeg()[:600], "image/jpeg"), data_url(jpeg()[: len(jpeg()) // 2], "image/jpeg"),
    data_url(png(GOOD.image)[:200]), data_url(b"GIF89a\x01", "image/gif"),
    data_url(b"RIFF\x10\0\0\0WEBPVP8 ", "image/webp"),
]  # fmt: skip
URLS = [
    *NO_IMAGES,
    "data:image/png;base64,A", "data:image/png;base64,AAAA====", "data:image/png;base64,A@AA",
    "data:image/png;base64,AA==AA==", "data:image/png,%zz", "data:text/html;base64,AAAA", "data:", "http://[", "http://a:b",
    "https://localhost:1/a.png", "https://127.0.0.1/a.png", "http://nowhere.invalid/a.png", "http://" + "a" * 70 + "/",
    "http://\u0130\u0307.example/", "file:///etc/passwd", "ftp://a/b", "7",
]  # fmt: skip


def test_what_is_wrong_with_the_place_of_an_image(start_server: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    hosts = frozenset({"localhost", "127.0.0.1", "nowhere.invalid", "a" * 63})
    server = start_server(media=MediaPolicy(allowed_domains=hosts, timeout=5))
    with heard(caplog):
        for url in URLS:
            reply = server.post(GOOD.body(**part(type="image_url", image_url={"url": url})))
            message = reply.json()["error"]["message"]
            assert reply.status_code == 400 and message.startswith("image "), message
            assert not LIBRARIES.search(message), message
    assert not [message for message in caplog.messages if LIBRARIES.search(message)]


def test_a_step_that_fails_tells_no_text_of_its_exception(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such luck at 0x7f0011223344")

    server = start_server()
    with monkeypatch.context() as patch:
        patch.setattr(Prefill, "advance", broken)
        message = server.post(GOOD.body()).json()["error"]["message"]
        assert "step failed (RuntimeError)" in message and not LIBRARIES.search(message)
    assert server.post(GOOD.body()).status_code == 200


def test_an_engine_that_fails_tells_no_text_of_its_exception(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Engine) -> StepResult:
        raise MemoryError("nothing left")

    server = start_server()
    monkeypatch.setattr(Engine, "step", broken)
    reply = server.post(GOOD.body())
    assert reply.json()["error"]["message"] == "the engine has stopped: a step failed"
    server.thread.join(20)


def test_a_request_that_the_engine_cannot_take_names_only_the_type(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("no such luck")

    server = start_server()
    monkeypatch.setattr(Engine, "add_request", broken)
    reply = server.post(GOOD.body())
    assert reply.status_code == 500
    assert reply.json()["error"]["message"].startswith("internal error (KeyError)")


def test_an_unexpected_error_has_its_id_and_keeps_the_connection(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the error under the id. The client's next requests go over the same connection."""
    server = start_server(cors=CorsPolicy(("*",)))

    async def broken(*_: object) -> None:
        raise ValueError("no such luck")

    monkeypatch.setattr(type(server.service.preparation), "chat", broken)
    for body, status in ((GOOD.body(), 500), (GOOD.body(stream=True), 500), (GOOD.body(n="a"), 400)):
        with heard(caplog):
            reply = server.post(body, headers={"X-Request-Id": "mine", "Origin": "https://a.example.com"})
        assert reply.status_code == status and reply.json()["error"]["code"] is None
        assert reply.headers.get_list("x-request-id") == ["mine"]
        assert reply.headers["access-control-allow-origin"] == "*"
    assert len([record for record in caplog.records if record.exc_info and "mine" in record.getMessage()]) == 2
    assert 'request_refused_total{model_name="tiny",status="500"} 2.0' in server.client.get("/metrics").text


def test_paths_and_methods(server: RunningServer) -> None:
    for method, path in (
        ("GET", "/v1/nothing"),
        ("GET", "/v1/completions"),
        ("TRACE", "/"),
        ("PROPFIND", "/v1/models"),
    ):
        message = server.client.request(method, path).json()["error"]["message"]
        assert repr(path) in message and not LIBRARIES.search(message)
