"""Bodies with more values than any request has are refused before they cost anything, by the name of their limit."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from dpn_rt.server.body_errors import describe
from dpn_rt.server.errors import HttpError
from dpn_rt.server.json_body import MAX_KEYS, MAX_MARKS, check_json
from dpn_rt.server.protocol import ChatRequest, CompletionRequest
from dpn_rt.server.service import _parsed
from dpn_rt.server.tokenization import DetokenizeRequest, TokenizeRequest
from tests.server.conftest import MODEL, Ask, RunningServer


def listed(item: bytes, count: int) -> bytes:
    return b"[" + b",".join([item] * count) + b"]"


def completion(prompt: bytes) -> bytes:
    return b'{"model": "tiny", "prompt": ' + prompt + b"}"


def keys(count: int) -> bytes:
    return b", ".join(b'"k%d": 1' % i for i in range(count))


PROMPTS = "at most 4096 prompts"
BODIES: dict[str, tuple[type[BaseModel], bytes, str]] = {
    "1 million empty prompts": (CompletionRequest, completion(listed(b'""', 10**6)), PROMPTS),
    "3 million empty prompts": (CompletionRequest, completion(listed(b'""', 3 * 10**6)), PROMPTS),
    "10 million empty prompts": (CompletionRequest, completion(listed(b'""', 10**7)), PROMPTS),
    "5,000 empty prompts": (CompletionRequest, completion(listed(b'""', 5000)), PROMPTS),
    "8 million ids": (CompletionRequest, completion(listed(b"1", 8 * 10**6)), "at most 1048576 token ids"),
    "1.1 million ids": (CompletionRequest, completion(listed(b"1", 1_100_000)), "expected at most 1048576"),
    "a million lists of ids": (CompletionRequest, completion(listed(b"[1]", 10**6)), PROMPTS),
    "60,000 lists of ids": (CompletionRequest, completion(listed(b"[1]", 60_000)), PROMPTS),
    "lists in lists": (CompletionRequest, completion(b"[" * 60_000 + b"]" * 60_000), "not valid JSON"),
    "a million wrong prompts": (CompletionRequest, completion(listed(b"null", 10**6)), PROMPTS),
    "wrong ids": (CompletionRequest, completion(listed(b"1.5", 4000)), "prompt.0"),
    "500,000 unknown keys": (CompletionRequest, b"{" + keys(500_000) + b"}", "more than 65536 keys"),
    "60,000 unknown keys": (ChatRequest, b"{" + keys(60_000) + b"}", "60000 keys: expected at most 256"),
    "1,000 keys of a hint": (ChatRequest, b'{"metadata": {' + keys(1000) + b"}}", "1000 keys: expected at most 256"),
    "1,000 keys of a message": (
        ChatRequest,
        b'{"messages": [{' + keys(1000) + b"}]}",
        "1000 keys: expected at most 256",
    ),
    "a million messages": (ChatRequest, b'{"messages": ' + listed(b"{}", 10**6) + b"}", PROMPTS),
    "60,000 messages": (ChatRequest, b'{"model": "a", "messages": ' + listed(b"{}", 60_000) + b"}", "messages"),
    "parts of a message": (
        ChatRequest,
        b'{"model": "a", "messages": [{"role": "user", "content": ' + listed(b"{}", 60_000) + b"}]}",
        "messages.0.content",
    ),
    "numbers in a field of none": (ChatRequest, b'{"user": ' + listed(b"1", 2 * 10**6) + b"}", "commas"),
    "images in a tokenize request": (TokenizeRequest, b'{"messages": ' + listed(b"{}", 10**6) + b"}", PROMPTS),
    "ids to a text": (DetokenizeRequest, b'{"tokens": ' + listed(b"1", 3 * 10**6) + b"}", "at most 1048576 token ids"),
    "wrong ids to a text": (DetokenizeRequest, b'{"tokens": ' + listed(b'""', 10**5) + b"}", "tokens.0"),
    "an endless number": (ChatRequest, b'{"seed": ' + b"1" * 10**6 + b"}", "not valid JSON"),
}


def message_of(kind: type[Any], body: bytes) -> str:
    try:
        _parsed(kind, body)
    except HttpError as error:
        return str(error)
    except ValidationError as error:
        assert error.error_count() < 1000
        return describe(error)[1]
    raise AssertionError("it was accepted")


@pytest.mark.parametrize("name", BODIES)
def test_the_limit_is_named(name: str) -> None:
    kind, body, message = BODIES[name]
    assert message in message_of(kind, body)


@pytest.mark.parametrize("name", ["10 million empty prompts", "8 million ids", "500,000 unknown keys"])
def test_what_is_counted_takes_no_memory(name: str) -> None:
    body = BODIES[name][1]
    tracemalloc.start()
    with pytest.raises(HttpError):
        check_json(body)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_requests_as_they_are_pass() -> None:
    body = json.dumps(Ask().body(metadata={f"k{i}": str(i) for i in range(MAX_KEYS)})).encode()
    assert _parsed(ChatRequest, body).messages
    text = ", [{:" * 20_000  # code has such characters too
    assert _parsed(CompletionRequest, completion(json.dumps(text).encode())).prompts == [text]
    ids = _parsed(CompletionRequest, completion(listed(b"1", 2**20))).prompts
    assert len(ids) == 1 and len(ids[0]) == 2**20
    assert len(_parsed(CompletionRequest, completion(listed(b'""', 4096))).prompts) == 4096
    for mark, (most, name) in MAX_MARKS.items():
        within = mark * most
        if mark != b":":
            check_json(within)
        with pytest.raises(HttpError, match=f"more than {most} {name}"):
            check_json(within + mark)


@pytest.mark.parametrize("stop", ["a" * 4097, ["b", "a" * 8_000_000]])
def test_a_stop_string_longer_than_any_use_is_refused(stop: Any) -> None:
    message = message_of(ChatRequest, json.dumps(Ask().body(stop=stop)).encode())
    assert message.startswith("stop") and "characters, expected at most 4096" in message and "str:" not in message


def test_the_server_refuses_them_and_goes_on(server: RunningServer) -> None:
    headers = {"Content-Type": "application/json"}
    for name in ("10 million empty prompts", "8 million ids", "500,000 unknown keys"):
        reply = server.client.post("/v1/completions", content=BODIES[name][1], headers=headers)
        assert reply.status_code == 400 and BODIES[name][2] in reply.json()["error"]["message"]
    assert server.post({"model": MODEL, "prompt": "a", "max_tokens": 1}, "/v1/completions").status_code == 200
