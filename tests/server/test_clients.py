"""Requests as the field's benchmark and evaluation clients send them, and what those clients read of the replies.

The bodies follow the clients' sources: guidellm's request handlers, aiperf's chat endpoint, vLLM's `bench serve`,
lmms-eval's OpenAI models, VLMEvalKit's API wrappers, litellm's and LangChain's requests.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.conftest import MODEL, Ask, RunningServer, data_url, png

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
URL = data_url(png(Ask().image))
TEXT, IMAGE = {"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": URL}}
DETAILED = {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}
USAGE, CONTINUOUS = {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}
SYSTEM = {"role": "system", "content": "Be brief."}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "guidellm chat": (
        CHAT,
        {"model": MODEL, "stream": True, "stream_options": CONTINUOUS, "max_completion_tokens": 6, "stop": None,
         "ignore_eos": True, "messages": [SYSTEM, user(TEXT, IMAGE)]},
    ),
    "guidellm completions": (
        COMPLETIONS,
        {"model": MODEL, "stream": True, "stream_options": CONTINUOUS, "max_tokens": 6, "stop": None,
         "ignore_eos": True, "prompt": "a red circle"},
    ),
    "guidellm whole": (
        CHAT,
        {"model": MODEL, "max_completion_tokens": 6, "stop": None, "ignore_eos": True, "messages": [user(TEXT, IMAGE)]},
    ),
    "aiperf chat": (
        CHAT,
        {"messages": [SYSTEM, {**user(TEXT, IMAGE), "name": "text"}], "model": MODEL, "stream": True,
         "max_completion_tokens": 6, "stream_options": USAGE},
    ),
    "aiperf chat, usage per chunk and image ids": (
        CHAT,
        {"messages": [user(TEXT, {**IMAGE, "uuid": "image-1"})], "model": MODEL, "stream": True, "max_tokens": 6,
         "ignore_eos": True, "min_tokens": 6, "stream_options": CONTINUOUS},
    ),
    "aiperf chat, several images and extra inputs": (
        CHAT,
        {"messages": [user(TEXT, IMAGE, IMAGE)], "model": MODEL, "stream": True, "max_completion_tokens": 6,
         "stream_options": USAGE, "ignore_eos": True, "min_tokens": 6, "temperature": 0.5, "top_k": 20, "min_p": 0.1,
         "repetition_penalty": 1.1, "seed": 7},
    ),
    "aiperf whole": (CHAT, {"messages": [user("Hello")], "model": MODEL, "stream": False, "max_completion_tokens": 6}),
    "vllm bench serve, openai-chat": (
        CHAT,
        {"model": MODEL, "messages": [user(TEXT, IMAGE)], "max_completion_tokens": 6, "stream": True,
         "stream_options": USAGE, "ignore_eos": True, "temperature": 0.0},
    ),
    "vllm bench serve, openai-chat with sampling options": (
        CHAT,
        {"model": MODEL, "messages": [user(TEXT, IMAGE)], "max_completion_tokens": 6, "stream": True,
         "stream_options": USAGE, "ignore_eos": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.0,
         "repetition_penalty": 1.1, "frequency_penalty": 0.1, "presence_penalty": 0.1, "min_tokens": 6},
    ),
    "vllm bench serve, openai": (
        COMPLETIONS,
        {"model": MODEL, "prompt": "a red circle", "repetition_penalty": 1.0, "max_tokens": 6, "logprobs": None,
         "stream": True, "stream_options": USAGE, "ignore_eos": True, "temperature": 0.0, "top_k": -1},
    ),
    "vllm bench serve, older": (
        COMPLETIONS,
        {"model": MODEL, "prompt": "a red circle", "temperature": 0.0, "best_of": 1, "use_beam_search": False,
         "repetition_penalty": 1.0, "max_tokens": 6, "logprobs": None, "stream": True, "ignore_eos": True,
         "stream_options": USAGE},
    ),
    "lmms-eval": (CHAT, {"messages": [user(IMAGE, TEXT)], "model": MODEL, "max_tokens": 6, "temperature": 0}),
    "lmms-eval, reasoning models": (
        CHAT,
        {"messages": [user(IMAGE, TEXT)], "model": MODEL, "reasoning_effort": "medium",
         "response_format": {"type": "text"}, "max_completion_tokens": 6},
    ),
    "VLMEvalKit": (
        CHAT,
        {"model": MODEL, "messages": [SYSTEM, user(DETAILED, TEXT)], "n": 1, "temperature": 0, "max_tokens": 6},
    ),
    "VLMEvalKit, streamed": (
        CHAT,
        {"model": MODEL, "messages": [user(TEXT, IMAGE)], "n": 1, "temperature": 0.0, "max_tokens": 6, "top_p": 0.001,
         "top_k": 1, "repetition_penalty": 1.0, "stream": True},
    ),
    "litellm": (
        CHAT + "/",
        {"model": MODEL, "messages": [user("Hello")], "temperature": 0.0, "max_tokens": 6, "top_p": 1,
         "extra_body": {}},
    ),
    "litellm, a conversation": (
        CHAT,
        {"model": MODEL, "stream": True, "stream_options": USAGE, "max_tokens": 6, "messages": [
            SYSTEM, user(TEXT, DETAILED),
            {"role": "assistant", "content": "A scene.", "tool_calls": None, "function_call": None},
            user("And now?"),
        ]},
    ),
    "LangChain": (
        CHAT,
        {"messages": [user(TEXT, IMAGE)], "model": MODEL, "stream": False, "temperature": 0.7,
         "max_completion_tokens": 6, "stop": None, "n": 1},
    ),
    "LangChain, streamed": (
        CHAT,
        {"messages": [{**SYSTEM, "name": None}, user("Hello")], "model": MODEL, "stream": True,
         "stream_options": USAGE, "max_completion_tokens": 6, "parallel_tool_calls": None, "logprobs": None},
    ),
}  # fmt: skip


def chunks_of(server: RunningServer, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with server.client.stream("POST", path, json=body) as reply:
        assert reply.status_code == 200, reply.read()
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_of_clients(server: RunningServer, name: str) -> None:
    path, body = REQUESTS[name]
    if not body.get("stream"):
        reply = server.post(body, path)
        assert reply.status_code == 200, reply.text
        assert isinstance(reply.json()["choices"][0]["message"]["content"], str)
        assert 1 <= reply.json()["usage"]["completion_tokens"] <= 6
        return
    chunks = chunks_of(server, path, body)
    *chunks, last = chunks if "stream_options" in body else [*chunks, {"choices": [], "usage": None}]
    assert last["choices"] == [] and all(chunk["choices"] for chunk in chunks)
    assert [bool(chunk.get("usage")) for chunk in chunks] == [body.get("stream_options") == CONTINUOUS] * len(chunks)
    if body.get("ignore_eos"):
        assert last["usage"]["completion_tokens"] == 6


LOAD_TOOLS = [name for name, (_, body) in REQUESTS.items() if body.get("ignore_eos") and body.get("stream")]


@pytest.mark.parametrize("name", LOAD_TOOLS)
def test_what_load_tools_read_of_a_stream(server: RunningServer, name: str) -> None:
    """They take the time of the first chunk with text, and the numbers of tokens from the last one."""
    path, body = REQUESTS[name]
    with server.client.stream("POST", path, json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = "".join(reply.iter_text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""], "events end with an empty line"
    assert all(event.startswith("data: ") and "\n" not in event for event in events[:-1])
    *chunks, last = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    texts = [c.get("text") or c.get("delta", {}).get("content") for chunk in chunks for c in chunk["choices"]]
    assert any(texts), "there is a first token"
    assert len({chunk["id"] for chunk in chunks} | {last["id"]}) == 1
    used = last["usage"]
    assert last["choices"] == [] and used["completion_tokens"] == 6
    assert used["total_tokens"] == used["prompt_tokens"] + 6
    num_images = json.dumps(body).count("data:image")
    assert used["prompt_tokens"] > 256 * num_images


@pytest.mark.parametrize("field", ["repetition_penality", "ignoreeos", "extra"])
def test_fields_that_nothing_knows_are_named(server: RunningServer, field: str) -> None:
    """A load tool's misspelt option would otherwise measure something else without a word."""
    reply = server.post({**REQUESTS["vllm bench serve, openai-chat"][1], field: 1})
    assert reply.status_code == 400 and f"unknown or unsupported field {field}" in reply.json()["error"]["message"]


def test_models_are_listed_as_vllm_lists_them(server: RunningServer) -> None:
    """Clients take the first model where none is named; vLLM's reads its root too."""
    card = server.client.get("/v1/models").json()["data"][0]
    assert card["id"] == card["root"] == MODEL
    assert card["object"] == "model" and card["max_model_len"] > 0 and card["parent"] is None


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": Ask().messages}),
        (COMPLETIONS, {"prompt": ["a red circle", "two"]}),
        (CHAT, {"messages": [user("Hello")], "stop": ["zzzz"]}),
    ],
)
def test_usage_of_every_chunk(server: RunningServer, path: str, fields: dict[str, Any], n: int) -> None:
    """It grows with the tokens and ends at the whole request's; `include_usage` is asked for as well, as in vLLM."""
    body = {"model": MODEL, "stream": True, "max_tokens": 5, "ignore_eos": True, "n": n, "seed": 1, **fields}
    *chunks, last = chunks_of(server, path, {**body, "stream_options": CONTINUOUS})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 0 if path == CHAT else counts[0] > 0
    assert counts[-1] == last["usage"]["completion_tokens"] == 5 * n * len(fields.get("prompt", [""]))
    for chunk in chunks:
        used = chunk["usage"]
        assert used["prompt_tokens"] == last["usage"]["prompt_tokens"] > 0
        assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
    for options in ({"continuous_usage_stats": True}, USAGE, {"include_usage": None, "continuous_usage_stats": None}):
        plain = chunks_of(server, path, {**body, "stream_options": options})
        assert not any(chunk.get("usage") for chunk in plain if chunk["choices"])
        assert all(
            ("usage" in chunk) == (options == USAGE) for chunk in plain
        )  # null before the last, as OpenAI has it
        assert any(chunk.get("usage") for chunk in plain) == (options == USAGE)
