"""`/tokenize` and `/detokenize` answer as vLLM's do, with the ids of the prompts that are served."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dpn_rt import LLM, SamplingParams
from dpn_rt.server.replies import ITEMS_AT_ONCE, encoded
from tests.server.conftest import MODEL, Ask, RunningServer, StartServer

TEXTS = ["a red circle", " two  spaces ", "é 猫 \n", "<s>begin", "a <image> b", "</s>", ""]


def tokenize(server: RunningServer, **body: Any) -> dict[str, Any]:
    reply = server.post(body, "/tokenize")
    assert reply.status_code == 200, reply.text
    result = dict(reply.json())
    assert set(result) == {"count", "max_model_len", "tokens", "token_strs"}
    assert result["count"] == len(result["tokens"])
    return result


@pytest.mark.parametrize("text", TEXTS)
def test_text(server: RunningServer, llm: LLM, text: str) -> None:
    tokenizer = llm.processor.tokenizer
    assert tokenizer is not None
    image_id = llm.processor.model.prompt.image_token_id
    whole = tokenize(server, model=MODEL, prompt=text, return_token_strs=True)
    assert whole["tokens"] == tokenizer.encode(text, image_id)
    assert whole["max_model_len"] == server.service.preparation.max_model_len
    entries = ["<image>" if i == -200 else tokenizer.token(i) for i in whole["tokens"]]
    assert whole["token_strs"] == entries
    assert tokenize(server, prompt=text)["token_strs"] is None
    bos = [tokenizer.bos_token_id] if tokenizer.encode("") else []
    bare = tokenize(server, prompt=text, add_special_tokens=False)["tokens"]
    assert bare == whole["tokens"][0 if text.startswith("<s>") else len(bos) :]


def test_what_a_text_costs_is_what_a_completion_costs(server: RunningServer) -> None:
    body = {"model": MODEL, "prompt": "two blue squares", "max_tokens": 1}
    used = server.post(body, "/v1/completions").json()["usage"]["prompt_tokens"]
    assert tokenize(server, prompt=body["prompt"])["count"] == used


@pytest.mark.parametrize("fields", [{}, {"add_generation_prompt": True, "continue_final_message": False}])
def test_messages(server: RunningServer, llm: LLM, fields: dict[str, Any]) -> None:
    ask = Ask()
    output = llm.chat(ask.local_messages, SamplingParams(max_tokens=1))[0]
    result = tokenize(server, model=MODEL, messages=ask.messages, **fields)
    assert result["tokens"] == output.prompt_token_ids
    assert result["tokens"].count(-200) == 1
    used = server.post(ask.body(max_tokens=1)).json()["usage"]
    assert used["prompt_tokens"] == result["count"] - 1 + used["prompt_tokens_details"]["image_tokens"]
    server.wait_until_idle()
    assert server.service.admission.answers == 0


def test_messages_with_an_answer_that_is_continued(server: RunningServer) -> None:
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one two"}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    result = tokenize(server, messages=messages, return_token_strs=True, **options)
    text = server.post({"tokens": result["tokens"]}, "/detokenize").json()["prompt"]
    assert text.endswith("one two")
    reply = server.post({"model": MODEL, "messages": messages, "max_tokens": 3, **options})
    assert reply.status_code == 200
    assert reply.json()["usage"]["prompt_tokens"] == result["count"]
    assert server.post({"messages": messages}, "/tokenize").status_code == 400


@pytest.mark.parametrize("text", ["a red circle", "é 猫 two", "a <image> b", "<s>"])
def test_text_comes_back(server: RunningServer, text: str) -> None:
    for adds in (True, False):
        tokens = tokenize(server, prompt=text, add_special_tokens=adds)["tokens"]
        back = server.post({"model": MODEL, "tokens": tokens}, "/detokenize").json()
        assert set(back) == {"prompt"}
        assert back["prompt"].replace("<s>", "").split() == text.replace("<s>", "").split()
    assert server.post({"tokens": []}, "/detokenize").json() == {"prompt": ""}


BAD: list[tuple[str, dict[str, Any], int, str]] = [
    ("/tokenize", {}, 400, "expected one of prompt and messages"),
    ("/tokenize", {"prompt": "a", "messages": Ask().messages}, 400, "expected one of prompt and messages"),
    ("/tokenize", {"prompt": ["a"]}, 400, "prompt: expected a string, got a list"),
    ("/tokenize", {"prompt": "a", "model": "other"}, 404, "expected 'tiny'"),
    ("/tokenize", {"prompt": "a" * 500_000}, 400, "characters: expected at most"),
    ("/tokenize", {"prompt": "a", "text": "b"}, 400, "unknown or unsupported field text"),
    ("/tokenize", {"messages": Ask().messages, "add_special_tokens": True}, 400, "add_special_tokens: true"),
    ("/tokenize", {"messages": [{"role": "tool", "content": "a"}]}, 400, "messages.0.role"),
    ("/tokenize", {"messages": Ask().messages, "tools": [{}]}, 400, "tools: not supported"),
    ("/detokenize", {}, 400, "tokens: missing"),
    ("/detokenize", {"tokens": [1, 10**6]}, 400, "tokens.1: 1000000, expected 0 to"),
    ("/detokenize", {"tokens": [-1]}, 400, "tokens.0: -1, expected 0 to"),
    ("/detokenize", {"tokens": ["a"]}, 400, "tokens.0: expected an integer, got a string"),
    ("/detokenize", {"tokens": [1], "model": "other"}, 404, "expected 'tiny'"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), BAD)
def test_refusals(server: RunningServer, path: str, body: dict[str, Any], status: int, message: str) -> None:
    reply = server.post(body, path)
    assert reply.status_code == status
    assert message in reply.json()["error"]["message"]


def test_conversations_wait_in_the_queue(start_server: StartServer) -> None:
    """Their images are decoded; texts and ids take no place."""
    server = start_server(max_queued_requests=1)
    with server.service.admission.enter(1):
        assert server.post({"messages": Ask().messages}, "/tokenize").status_code == 429
        assert tokenize(server, prompt="a")["count"] > 0
        assert server.post({"tokens": [5]}, "/detokenize").status_code == 200


@pytest.mark.parametrize("tokens", [[-200], [-200, -200], [5, -200], [-200, 5], [5, -200, -200, 6, -200]])
def test_images_among_ids(server: RunningServer, llm: LLM, tokens: list[int]) -> None:
    tokenizer = llm.processor.tokenizer
    assert tokenizer is not None
    expected = "".join("<image>" if i == -200 else tokenizer.decode([i], skip_special_tokens=False) for i in tokens)
    assert server.post({"tokens": tokens}, "/detokenize").json()["prompt"].replace(" ", "") == expected.replace(" ", "")


@pytest.mark.parametrize("count", [0, 1, ITEMS_AT_ONCE - 1, ITEMS_AT_ONCE, ITEMS_AT_ONCE + 1, 3 * ITEMS_AT_ONCE])
def test_long_replies_are_encoded_in_pieces(count: int) -> None:
    texts = ["", '"', "\\", "\n", "\0", "\u2028", "é", "\U0001f600"]
    reply = {
        "count": count,
        "tokens": list(range(count)),
        "token_strs": [texts[i % 8] for i in range(count)],
        "a": None,
    }
    assert json.loads(encoded(reply)) == reply
