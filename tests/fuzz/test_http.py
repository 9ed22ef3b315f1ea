"""Bodies of requests: each gets 200 or a 4xx status with an error in OpenAI's form, and the server goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from dpn_rt.engine.loader import load_bare_engine, load_processor
from dpn_rt.server.app import create_app
from dpn_rt.server.config import ServerConfig
from tests.fuzz.harness import Surface, assert_own_words, fuzz
from tests.fuzz.json_mutations import encode, mutate_json
from tests.server.conftest import MODEL, OPTIONS, Ask, data_url, engine_dir, png  # noqa: F401  (a fixture)
from tests.server.local_engine import LocalEngine

Result = TypeVar("Result")
MOST_TOKENS = 2
"""Of an answer, only to be quick."""
URL = data_url(png(Ask().image.resize((8, 8))))
CHAT = Ask().body(messages=[{"role": "user", "content": [
    {"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "What color?"}]}])  # fmt: skip
TEXT = {"model": MODEL, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]}
COMPLETION = {"model": MODEL, "prompt": "The background is", "temperature": 0}
ALL_FIELDS = {
    "temperature": 0.7, "top_p": 0.9, "n": 2, "stop": ["a", "b"], "seed": 7, "presence_penalty": 0.1, "min_p": 0.01,
    "frequency_penalty": 0.1, "top_k": 5, "repetition_penalty": 1.1, "min_tokens": 1, "stop_token_ids": [3, 4],
    "ignore_eos": True, "skip_special_tokens": False, "include_stop_str_in_output": True, "router_bias": 0.5,
    "route": [0, 1, 2],
}  # fmt: skip
STREAMED = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
CONTINUED = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I am"}]
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, **ALL_FIELDS, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {**TEXT, **STREAMED}),
    ("/v1/chat/completions", {**TEXT, "messages": CONTINUED, "continue_final_message": True}),
    ("/v1/chat/completions", {**CHAT, "messages": CHAT["messages"] * 2, "reduce": "none", "user": "a"}),
    ("/v1/completions", COMPLETION),
    ("/v1/completions", {**COMPLETION, **ALL_FIELDS, **STREAMED, "logprobs": 2, "echo": False, "route": None}),
    ("/v1/completions", {**COMPLETION, "prompt": [[1, 5, 6], [1, 7]]}),
    ("/v1/completions", {**COMPLETION, "prompt": ["a", "b"]}),
    ("/tokenize", {"model": MODEL, "prompt": "What color?", "return_token_strs": True, "add_special_tokens": True}),
    ("/tokenize", {"model": MODEL, "messages": CHAT["messages"], "chat_template_kwargs": {"a": 1}}),
    ("/detokenize", {"model": MODEL, "tokens": [1, 5, 6]}),
]  # fmt: skip


class InProcess:
    """The application on an event loop of its own, and an engine on a thread."""

    def __init__(self, engine: Path) -> None:
        self._runner = asyncio.Runner()
        process = LocalEngine(load_bare_engine(engine, "cpu", OPTIONS))
        app = create_app(load_processor(engine, "cpu", OPTIONS), process, ServerConfig(model_name=MODEL))
        self.service = app.state.service
        self._lifespan = app.router.lifespan_context(app)
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=None)
        self._run(self._lifespan.__aenter__())

    def close(self) -> None:
        self._run(self._client.aclose())
        self._run(self._lifespan.__aexit__(None, None, None))
        self._runner.close()

    def post(self, path: str, body: bytes) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return self._run(self._client.post(path, content=body, headers=headers))

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self._runner.run(work)


@pytest.fixture(scope="module")
def app(engine_dir: Path) -> Iterator[InProcess]:  # noqa: F811
    app = InProcess(engine_dir)
    yield app
    app.close()


def test_every_body_gets_an_answer_or_an_error_of_our_own(app: InProcess) -> None:
    def check(data: bytes) -> None:
        path, body = split(data)
        check_reply(app.post(path, body))

    fuzz(Surface("http", [seed(path, body) for path, body in REQUESTS], mutate, check))
    assert not app.service.admission.active
    assert app.post(*REQUESTS[0][:1], encode({**CHAT, "max_tokens": MOST_TOKENS})).status_code == 200


def seed(path: str, body: dict[str, Any]) -> bytes:
    """An input: the path on a line of its own, then the body."""
    return path.encode() + b"\n" + encode(quick(path, body))


def split(data: bytes) -> tuple[str, bytes]:
    path, _, body = data.partition(b"\n")
    return path.decode(), body


def mutate(data: bytes, rng: Any) -> bytes:
    path, body = split(data)
    changed = mutate_json(body, rng)
    with contextlib.suppress(ValueError, RecursionError):  # bytes that are not JSON are an input as well
        changed = encode(quick(path, json.loads(changed)))
    return path.encode() + b"\n" + changed


def quick(path: str, body: Any) -> Any:
    """The body with few tokens to answer, unless something else is in that place."""
    if not isinstance(body, dict) or not path.startswith("/v1"):
        return body
    few = {"max_tokens": MOST_TOKENS}
    for name, most in (("max_tokens", MOST_TOKENS), ("max_completion_tokens", MOST_TOKENS), ("n", 3)):
        if isinstance(body.get(name), int) and not isinstance(body[name], bool) and body[name] > most:
            few[name] = most if body[name] < 1000 else body[name] % most + 1
    return {**body, **({} if "max_tokens" in body and "max_tokens" not in few else few)}


def check_reply(reply: httpx.Response) -> None:
    assert reply.status_code == 200 or 400 <= reply.status_code < 500, f"{reply.status_code}: {reply.text[:500]}"
    if reply.status_code != 200:
        check_error(reply.json())
    elif reply.headers["content-type"].startswith("text/event-stream"):
        check_events(reply.text)
    else:
        assert isinstance(json.loads(reply.content, parse_constant=refuse_constant), dict)


def check_events(text: str) -> None:
    """The events of a stream: JSON with choices, an error or usage, then [DONE]."""
    *events, last, nothing = re.split(r"\r?\n\r?\n", text)
    assert (last, nothing) == ("data: [DONE]", ""), text[-200:]
    for event in events:
        content = json.loads(event.removeprefix("data: "), parse_constant=refuse_constant)
        if "error" in content:
            check_error(content)


def check_error(body: Any) -> None:
    """OpenAI's form of an error that is the client's."""
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}, str(body)[:300]
    error = body["error"]
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str) and error["type"] != "server_error", error
    assert all(isinstance(error[name], str | None) for name in ("param", "code")), error
    assert_own_words(error["message"])


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")
