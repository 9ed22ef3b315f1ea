"""Bodies with more values than any request has are refused before they cost anything, by the name of their limit."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from dpn_rt.server import service
from dpn_rt.server.body_errors import describe
from dpn_rt.server.errors import HttpError
from dpn_rt.server.json_body import MAX_KEYS, MAX_MARKS, check_json
from dpn_rt.server.media import loader
from dpn_rt.server.protocol import ChatRequest, CompletionRequest
from dpn_rt.server.service import _parsed
from dpn_rt.server.tokenization import DetokenizeRequest, TokenizeRequest
from tests.server.conftest import MODEL, Ask, RunningServer, StartServer


def listed(item: bytes, count: int) -> bytes:
    return b"[" + b",".join([item] * count) + b"]"


def completion(prompt: bytes) -> bytes:
    return b'{"model": "tiny", "prompt": ' + prompt + b"}"


def keys(count: int) -> bytes:
    return b", ".join(b'"k%d": 1' % i for i in range(count))


def url_of(data: str, before: str = "") -> bytes:
    part = f'{{"type": "image_url", "image_url": "{before}data:image/png;base64,{data}"}}'
    return f'{{"model": "tiny", "messages": [{{"role": "user", "content": [{part}]}}]}}'.encode()


TEXT = "bytes beside data URLs: expected at most 10485760"
PROMPTS = "at most 4096 prompts"
BODIES: dict[str, tuple[type[BaseModel], Callable[[], bytes], str]] = {
    "1 million empty prompts": (CompletionRequest, lambda: completion(listed(b'""', 10**6)), PROMPTS),
    "3 million empty prompts": (CompletionRequest, lambda: completion(listed(b'""', 3 * 10**6)), PROMPTS),
    "10 million empty prompts": (CompletionRequest, lambda: completion(listed(b'""', 10**7)), PROMPTS),
    "5,000 empty prompts": (CompletionRequest, lambda: completion(listed(b'""', 5000)), PROMPTS),
    "8 million ids": (CompletionRequest, lambda: completion(listed(b"1", 8 * 10**6)), "at most 1048576 token ids"),
    "1.1 million ids": (CompletionRequest, lambda: completion(listed(b"1", 1_100_000)), "expected at most 1048576"),
    "a million lists of ids": (CompletionRequest, lambda: completion(listed(b"[1]", 10**6)), PROMPTS),
    "60,000 lists of ids": (CompletionRequest, lambda: completion(listed(b"[1]", 60_000)), PROMPTS),
    "lists in lists": (CompletionRequest, lambda: completion(b"[" * 60_000 + b"]" * 60_000), "not valid JSON"),
    "a million wrong prompts": (CompletionRequest, lambda: completion(listed(b"null", 10**6)), PROMPTS),
    "wrong ids": (CompletionRequest, lambda: completion(listed(b"1.5", 4000)), "prompt.0"),
    "500,000 unknown keys": (CompletionRequest, lambda: b"{" + keys(500_000) + b"}", "more than 65536 keys"),
    "60,000 unknown keys": (ChatRequest, lambda: b"{" + keys(60_000) + b"}", "60000 keys: expected at most 256"),
    "1,000 keys of a hint": (
        ChatRequest,
        lambda: b'{"metadata": {' + keys(1000) + b"}}",
        "1000 keys: expected at most 256",
    ),
    "1,000 keys of a message": (
        ChatRequest,
        lambda: b'{"messages": [{' + keys(1000) + b"}]}",
        "1000 keys: expected at most 256",
    ),
    "a million messages": (ChatRequest, lambda: b'{"messages": ' + listed(b"{}", 10**6) + b"}", PROMPTS),
    "60,000 messages": (ChatRequest, lambda: b'{"model": "a", "messages": ' + listed(b"{}", 60_000) + b"}", "messages"),
    "parts of a message": (
        ChatRequest,
        lambda: b'{"model": "a", "messages": [{"role": "user", "content": ' + listed(b"{}", 60_000) + b"}]}",
        "messages.0.content",
    ),
    "numbers in a field of none": (ChatRequest, lambda: b'{"user": ' + listed(b"1", 2 * 10**6) + b"}", "commas"),
    "images in a tokenize request": (TokenizeRequest, lambda: b'{"messages": ' + listed(b"{}", 10**6) + b"}", PROMPTS),
    "ids to a text": (
        DetokenizeRequest,
        lambda: b'{"tokens": ' + listed(b"1", 3 * 10**6) + b"}",
        "at most 1048576 token ids",
    ),
    "wrong ids to a text": (DetokenizeRequest, lambda: b'{"tokens": ' + listed(b'""', 10**5) + b"}", "tokens.0"),
    "2 million escapes": (
        CompletionRequest,
        lambda: completion(b'"' + b"\\u00e9" * 2**21 + b'"'),
        "more than 1048576 escapes",
    ),
    "12 MB of text": (CompletionRequest, lambda: completion(b'"' + b"a" * (12 << 20) + b'"'), TEXT),
    "12 MB of spaces": (ChatRequest, lambda: b"{" + b" " * (12 << 20) + b"}", TEXT),
    "12 MB of numbers": (ChatRequest, lambda: b'{"user": ' + listed(b"1" * 4000, 3200) + b"}", TEXT),
    "a text that begins like a data URL": (ChatRequest, lambda: url_of("a" * (12 << 20) + "\U0001f600"), TEXT),
    "the same with escapes": (ChatRequest, lambda: url_of("a" * (12 << 20) + "\\ud83d\\ude00"), TEXT),
    "12 MB in short strings": (
        ChatRequest,
        lambda: b'{"user": ' + listed(b'"data:' + b"a" * 2000 + b'"', 6000) + b"}",
        TEXT,
    ),
    "an endless number": (ChatRequest, lambda: b'{"seed": ' + b"1" * 10**6 + b"}", "not valid JSON"),
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
    assert message in message_of(kind, body())


@pytest.mark.parametrize("name", ["10 million empty prompts", "8 million ids", "500,000 unknown keys"])
def test_what_is_counted_takes_no_memory(name: str) -> None:
    body = BODIES[name][1]()
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
    ids = _parsed(CompletionRequest, completion(b"[" + listed(b"31999, 9", 2**15) + b", [1]]")).prompts
    assert [len(each) for each in ids] == [2**16, 1]
    assert _parsed(CompletionRequest, completion(listed(b"-2147483648", 2**19))).prompts == [[-(2**31)] * 2**19]
    for mark, (most, name) in MAX_MARKS.items():
        within = mark * most
        if mark != b":":
            check_json(within)
        with pytest.raises(HttpError, match=f"more than {most} {name}"):
            check_json(within + mark)


@pytest.mark.parametrize(("escaped", "before"), [("/", ""), (r"\/", ""), (r"\u002B", ""), ("/", r" \r\n ")])
def test_data_urls_of_all_sizes_pass(escaped: str, before: str) -> None:
    """As encoders write them: some escape slashes, some the plus sign; and after white space."""
    data = escaped * 400_000 + "QUJD" * 2**22
    (message,) = _parsed(ChatRequest, url_of(data, before)).messages
    assert message.images[0].url == json.loads(f'"{before}data:image/png;base64,{data}"')


@pytest.mark.parametrize("place", [0, 2**14 - 1, 2**14, 2**16 - 1])
@pytest.mark.parametrize("wrong", ["true", "1.0", "null", '"1"', "2147483648", "-2147483649", "[1]"])
def test_a_wrong_id_is_named_wherever_it_is(place: int, wrong: str) -> None:
    ids = listed(b"1", 2**16).split(b",")
    ids[place] = (b"[" if place == 0 else b"") + wrong.encode() + (b"]" if place == 2**16 - 1 else b"")
    message = message_of(DetokenizeRequest, b'{"tokens": ' + b",".join(ids) + b"}")
    assert message.startswith(f"tokens.{place}: ")


@pytest.mark.parametrize("stop", ["a" * 4097, ["b", "a" * 8_000_000]])
def test_a_stop_string_longer_than_any_use_is_refused(stop: Any) -> None:
    message = message_of(ChatRequest, json.dumps(Ask().body(stop=stop)).encode())
    assert message.startswith("stop") and "characters, expected at most 4096" in message and "str:" not in message


def test_the_server_refuses_them_and_goes_on(server: RunningServer) -> None:
    headers = {"Content-Type": "application/json"}
    for name in ("10 million empty prompts", "8 million ids", "500,000 unknown keys"):
        reply = server.client.post("/v1/completions", content=BODIES[name][1](), headers=headers)
        assert reply.status_code == 400 and BODIES[name][2] in reply.json()["error"]["message"]
    assert server.post({"model": MODEL, "prompt": "a", "max_tokens": 1}, "/v1/completions").status_code == 200


def test_long_bodies_and_data_urls_are_read_one_at_a_time(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each keeps Python's lock for some milliseconds at a time. Together they would keep the event loop waiting."""
    threads: dict[str, set[int]] = {"body": set(), "url": set()}

    def noting(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            threads[kind].add(threading.get_ident())
            return function(*arguments)

        return noted

    monkeypatch.setattr(service, "_parsed", noting("body", _parsed))
    monkeypatch.setattr(loader, "decode_data_url", noting("url", loader.decode_data_url))
    server = start_server()
    body = url_of("QUJD" * 2**18)
    headers = {"Content-Type": "application/json"}
    with ThreadPoolExecutor(4) as clients:
        replies = clients.map(
            lambda _: httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers), range(8)
        )
    assert [reply.status_code for reply in replies] == [400] * 8
    assert len(threads["body"] | threads["url"]) == 1 and server.thread.ident not in threads["body"]
