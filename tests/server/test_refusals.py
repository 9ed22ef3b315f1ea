"""Requests that cannot be served are refused with the right status, in OpenAI's form, and do not affect others."""

from __future__ import annotations

import io
import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from dpn_rt.server.media.policy import MediaPolicy
from dpn_rt.settings import EngineOptions
from tests.server.conftest import MODEL, Ask, RunningServer, StartServer, data_url, png

GOOD = Ask()
AS_JSON = {"Content-Type": "application/json"}


def with_url(url: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return GOOD.body(messages=[{"role": "user", "content": [part, {"type": "text", "text": "?"}]}])


def truncated() -> bytes:
    content = png(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)))
    return content[: len(content) // 2]


def bomb() -> bytes:
    """20,000 x 20,000 pixels in 50 kB."""
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


BAD_BODIES: dict[str, tuple[Any, int, str]] = {
    "no model": ({"messages": []}, 400, "model"),
    "no messages": (GOOD.body(messages=[]), 400, "messages"),
    "unknown field": (GOOD.body(temprature=1), 400, "unknown or unsupported field temprature"),
    "wrong type": (GOOD.body(max_tokens="8"), 400, "max_tokens"),
    "other model": (GOOD.body(model="gpt"), 404, "expected 'tiny'"),
    "temperature": (GOOD.body(temperature=-1), 400, "temperature=-1"),
    "top_p": (GOOD.body(top_p=0), 400, "top_p=0"),
    "empty stop": (GOOD.body(stop=[""]), 400, "stop"),
    "stop token": (GOOD.body(stop_token_ids=[10**6]), 400, "stop_token_ids"),
    "route": (GOOD.body(route=[0]), 400, "route=[0]"),
    "router bias": (GOOD.body(router_bias=1e9), 400, "router_bias"),
    "role": (GOOD.body(messages=[{"role": "tool", "content": "x"}]), 400, "role"),
    "last role": (GOOD.body(messages=[{"role": "assistant", "content": "x"}]), 400, "expected user"),
    "too long": (GOOD.body(messages=[{"role": "user", "content": "word " * 3000}]), 400, "rows"),
    "17 images": (GOOD.body(messages=GOOD.messages * 17), 400, "17 images: expected at most 16 per prompt"),
    "no data": (with_url("data:image/png;base64,"), 400, "image"),
    "bad base64": (with_url("data:image/png;base64,@@@@"), 400, "base64"),
    "no image": (with_url(data_url(b"hello")), 400, "not an image"),
    "truncated image": (with_url(data_url(truncated())), 400, "truncated or damaged"),
    "bomb": (with_url(data_url(bomb())), 400, "pixels"),
    "http": (with_url("http://example.com/a.png"), 400, "example.com"),
    "file": (with_url("file:///etc/hostname"), 400, "file"),
    "ftp": (with_url("ftp://example.com/a.png"), 400, "ftp"),
    "url number": (with_url(7), 400, "url"),
    "tools": (GOOD.body(tools=[{"type": "function"}]), 400, "tools: not supported, expected it left out or null or []"),
    "format": (GOOD.body(response_format={"type": "json_object"}), 400, "response_format: not supported"),
    "no content": (GOOD.body(messages=[{"role": "user", "content": None}]), 400, "content: null"),
    "17 stop strings": (GOOD.body(stop=["x"] * 17), 400, "stop: 17 items, expected at most 16"),
    "top logprobs alone": (GOOD.body(top_logprobs=2), 400, "expected logprobs=true"),
    "huge text": (GOOD.body(messages=[{"role": "user", "content": "a " * 200_000}]), 400, "characters: expected"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_request(server: RunningServer, name: str) -> None:
    body, status, message = BAD_BODIES[name]
    reply = server.post(body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    streamed = server.post({**body, "stream": True})
    assert streamed.status_code == status and streamed.json()["error"]["message"]
    assert server.post(GOOD.body()).status_code == 200
    server.wait_until_idle()
    assert server.service.admission.answers == 0


def test_the_field_that_is_wrong_is_named(server: RunningServer) -> None:
    """As `param`, which OpenAI's clients show."""
    wrong: dict[str, dict[str, Any]] = {
        "temperature": {"temperature": -1},
        "top_p": {"top_p": 2},
        "seed": {"seed": 2**70},
        "presence_penalty": {"presence_penalty": 3},
        "frequency_penalty": {"frequency_penalty": 3},
        "repetition_penalty": {"repetition_penalty": 0},
        "min_tokens": {"min_tokens": 9},
        "n": {"n": 2},
        "stop": {"stop": [""]},
        "stop_token_ids": {"stop_token_ids": [10**6]},  # by the engine's process
        "top_logprobs": {"top_logprobs": 2},
        "stream_options": {"stream_options": {"include_usage": True}},
        "route": {"route": [0]},
        "router_bias": {"router_bias": 1e9},
        "messages.0.content": {"messages": [{"role": "user"}]},
        "messages": with_url("data:image/png;base64,"),
    }
    for field, fields in wrong.items():
        reply = server.post(GOOD.body(**fields))
        assert reply.status_code == 400 and reply.json()["error"]["param"] == field, reply.text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model": NaN}', b"\xff\xfe", b'"' + b"a" * 100_000])
def test_no_json(server: RunningServer, body: bytes) -> None:
    reply = server.client.post("/v1/chat/completions", content=body, headers=AS_JSON)
    assert reply.status_code == 400 and reply.json()["error"]["message"]


def test_unknown_paths_and_methods(server: RunningServer) -> None:
    assert server.client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    reply = server.client.get("/v1/chat/completions")
    assert reply.status_code == 405 and "error" in reply.json()


def test_the_key_covers_every_path_but_health(start_server: StartServer) -> None:
    server = start_server(api_key="secret")
    paths = list(server.client.get("/openapi.json", headers=key("secret")).json()["paths"])
    assert "/metrics" in paths
    for path in [*paths, "/", "/docs", "/openapi.json"]:
        expected = 200 if path == "/health" else 401
        for headers in ({}, key("wrong"), {"Authorization": "secret"}):
            assert server.client.get(path, headers=headers).status_code == expected, path
    assert server.post(GOOD.body()).json()["error"]["type"] == "authentication_error"
    assert server.post(GOOD.body(), headers=key("secret")).status_code == 200


def key(value: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {value}"}


def test_large_bodies_are_refused_before_they_are_read(start_server: StartServer) -> None:
    server = start_server(max_body_bytes=200_000)
    assert server.post(GOOD.body()).status_code == 200
    assert server.post(with_url("x" * 300_000)).status_code == 413
    endless = (b"x" * 65_536 for _ in range(100))  # no Content-Length: counted as it arrives
    assert server.client.post("/v1/chat/completions", content=endless, headers=AS_JSON).status_code == 413
    server = start_server(media=MediaPolicy(max_image_bytes=1000))
    reply = server.post(GOOD.body())
    assert reply.status_code == 413 and "1000" in reply.json()["error"]["message"]


def test_bodies_of_all_requests_share_a_limit(start_server: StartServer) -> None:
    """Bodies that are still being sent count. A small request still passes, and a client that ends frees its room."""
    server = start_server(max_body_bytes=200_000, max_held_body_bytes=200_000)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        fields = f"Host: {host}\r\nContent-Type: application/json\r\nContent-Length: 200000\r\n\r\n"
        head = f"POST /v1/chat/completions HTTP/1.1\r\n{fields}"
        slow.sendall(head.encode() + b"x" * 199_000)
        refused = status_becomes(server, GOOD.body(), 429)
        assert refused.headers["Retry-After"] == "1" and "200000 together" in refused.json()["error"]["message"]
        text_alone = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        assert server.post(text_alone).status_code == 200
    status_becomes(server, GOOD.body(), 200)
    counts = server.client.get("/metrics").text
    assert 'request_refused_total{model_name="tiny",status="429"}' in counts


def status_becomes(server: RunningServer, body: Any, status: int) -> httpx.Response:
    deadline = time.monotonic() + 20
    while (reply := server.post(body)).status_code != status:
        assert time.monotonic() < deadline, reply.text
        time.sleep(0.01)
    return reply


def test_local_files_only_below_their_folder(start_server: StartServer, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    GOOD.image.save(folder / "good.png")
    GOOD.image.save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    server = start_server(media=MediaPolicy(allowed_local_path=folder))
    assert server.post(with_url((folder / "good.png").as_uri())).status_code == 200
    for path in (tmp_path / "secret.png", folder / "link.png", folder / ".." / "secret.png", folder):
        assert server.post(with_url(f"file://{path}")).status_code == 400


def test_a_full_queue_is_told_before_anything_is_decoded(start_server: StartServer) -> None:
    server = start_server(max_queued_requests=1)
    with server.service.admission.enter(1):
        reply = server.post(with_url(data_url(b"not an image")))
        assert reply.status_code == 429 and reply.headers["Retry-After"] == "1"
    assert server.post(GOOD.body()).status_code == 200
    server = start_server(max_queued_tokens=500)
    with server.service.admission.enter(300):
        assert server.post(GOOD.body()).status_code == 429
    assert server.post(GOOD.body(max_tokens=10_000)).status_code == 200, "alone it is never too large"


@pytest.mark.parametrize(
    "fields",
    [{"temperature": -1}, {"messages": [{"role": "user", "content": "a " * 200_000}]}],
    ids=["value", "length"],
)
def test_what_is_wrong_by_itself_takes_no_place_in_the_queue(start_server: StartServer, fields: dict[str, Any]) -> None:
    server = start_server(max_queued_requests=1)
    with server.service.admission.enter(1):
        assert server.post(GOOD.body(**fields)).status_code == 400


def test_every_prompt_takes_a_place_in_the_queue(start_server: StartServer) -> None:
    server = start_server(max_queued_requests=4)
    body = {"model": "tiny", "prompt": ["a"] * 4, "max_tokens": 1}
    with server.service.admission.enter(1):
        assert server.post(body, "/v1/completions").status_code == 429
    assert server.post(body, "/v1/completions").status_code == 200
    assert server.service.admission.answers == server.service.admission.tokens == 0


def test_a_prompt_that_does_not_fit_is_refused_before_others_of_its_request_stream(start_server: StartServer) -> None:
    server = start_server(EngineOptions(max_num_seqs=2, kv_cache_bytes=2_000_000))
    body = {"model": "tiny", "prompt": ["a", "a " * 300], "max_tokens": 600, "stream": True}
    reply = server.post(body, "/v1/completions")
    assert reply.status_code == 400 and "KV blocks" in reply.json()["error"]["message"]
    server.wait_until_idle()


def test_what_the_cache_cannot_hold(start_server: StartServer) -> None:
    server = start_server(EngineOptions(max_num_seqs=2, kv_cache_bytes=2_000_000))
    reply = server.post(GOOD.body(max_tokens=700))
    assert reply.status_code == 400 and "KV blocks" in reply.json()["error"]["message"]
    streamed = server.post(GOOD.body(max_tokens=700, stream=True))
    assert streamed.status_code == 400, "refused before the stream begins"


def test_unexpected_errors_tell_only_their_type(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise ValueError("internal detail")

    monkeypatch.setattr(type(server.service.preparation), "chat", broken)
    reply = server.post(GOOD.body())
    assert reply.status_code == 500 and "internal detail" not in reply.text and "ValueError" in reply.text


def test_request_ids_come_back_and_never_mix_requests(server: RunningServer) -> None:
    replies = [server.post(GOOD.body(), headers={"X-Request-Id": "mine"}) for _ in range(2)]
    assert [reply.headers["X-Request-Id"] for reply in replies] == ["mine", "mine"]
    assert replies[0].json()["id"] != replies[1].json()["id"]
    odd = server.post(GOOD.body(), headers={"X-Request-Id": "a b"})
    assert json.dumps(odd.headers["X-Request-Id"]).isascii() and odd.headers["X-Request-Id"] != "a b"
