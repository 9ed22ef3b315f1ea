"""Options of chat requests reach the prompt, and what has no effect is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.reference import EagerDpn
from examples.tiny_dpn import train
from examples.tiny_dpn.model import EXPERTS, model_config
from examples.tiny_dpn.tokenizer import train_tokenizer
from tests.server.conftest import MODEL, OPTIONS, Ask, RunningServer, run_server

TALK: list[dict[str, Any]] = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one two"}]


@pytest.fixture(scope="module")
def dense_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(7)
    train.save_checkpoint(EagerDpn(model_config("dense", train_tokenizer().get_vocab_size())), folder / "checkpoint")
    running = run_server(build_engine(folder / "checkpoint", folder / MODEL, dtype="float32").path, OPTIONS)
    yield running
    running.stop()


@pytest.mark.parametrize("fields", [{"router_bias": 2.0}, {"router_bias": -0.5}, {"route": [0, 1, 2]}])
def test_steering_of_a_model_without_routers(dense_server: RunningServer, fields: dict[str, Any]) -> None:
    for path, body in (
        ("/v1/chat/completions", Ask().body(**fields)),
        ("/v1/completions", {"model": MODEL, "prompt": "a", "max_tokens": 1, **fields}),
    ):
        reply = dense_server.post(body, path)
        assert reply.status_code == 400 and next(iter(fields)) in reply.json()["error"]["message"]


@pytest.mark.parametrize("fields", [{}, {"router_bias": 0}, {"router_bias": None, "route": None}])
def test_no_steering_of_a_model_without_routers(dense_server: RunningServer, fields: dict[str, Any]) -> None:
    assert dense_server.post(Ask().body(**fields)).status_code == 200


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False}])
def test_an_answer_is_continued(server: RunningServer, llm: LLM, options: dict[str, Any]) -> None:
    options = {"continue_final_message": True, **options}
    body = {"model": MODEL, "messages": TALK, "temperature": 0, "max_tokens": 6}
    expected = llm.chat(TALK, SamplingParams(temperature=0, max_tokens=6), **options)[0]
    reply = server.post({**body, **options}).json()
    assert reply["choices"][0]["message"]["content"] == expected.outputs[0].text
    assert reply["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    for refused in ({}, {**options, "add_generation_prompt": True}):
        assert server.post({**body, **refused}).status_code == 400


def test_assistants_without_content_and_with_refusals(server: RunningServer, llm: LLM) -> None:
    refusal = {"type": "refusal", "refusal": "I may not."}
    question = {"role": "user", "content": "Count."}
    greedy = SamplingParams(temperature=0, max_tokens=6)
    for message, said in (({}, ""), ({"content": [{"type": "text", "text": "No. "}, refusal]}, "No. I may not.")):
        talk = [question, {"role": "assistant", **message}, question]
        same = [question, {"role": "assistant", "content": said}, question]
        reply = server.post({"model": MODEL, "messages": talk, "temperature": 0, "max_tokens": 6})
        assert reply.status_code == 200, reply.text
        expected = llm.chat(same, greedy)[0]
        assert reply.json()["choices"][0]["message"]["content"] == expected.outputs[0].text
        assert reply.json()["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    for wrong, reason in (({}, "missing"), ({"content": None}, "null"), ({"content": [refusal]}, "a refusal")):
        reply = server.post({"model": MODEL, "messages": [{"role": "user", **wrong}], "max_tokens": 1})
        message = reply.json()["error"]["message"]
        assert reply.status_code == 400 and f"content: {reason} in a message of role 'user'" in message


def test_variables_of_the_template(server: RunningServer) -> None:
    body = Ask().body(chat_template_kwargs={"enable_thinking": False})
    assert server.post(body).json()["choices"] == server.post(Ask().body()).json()["choices"]
    refused = server.post(Ask().body(chat_template_kwargs={"messages": []}))
    assert refused.status_code == 400 and "chat_template_kwargs" in refused.json()["error"]["message"]


def test_the_kernels_that_a_route_can_force_are_listed(server: RunningServer, dense_server: RunningServer) -> None:
    for running, kernels in ((server, [[list(kernel) for kernel in EXPERTS]] * 3), (dense_server, [])):
        assert running.client.get("/v1/models").json()["data"][0]["pooling_kernels"] == kernels
        assert running.client.get(f"/v1/models/{MODEL}").json()["pooling_kernels"] == kernels


def ids_of(server: RunningServer, messages: list[dict[str, Any]]) -> list[int]:
    """As the server makes them, and as it counts them when it answers."""
    tokens = server.post({"model": MODEL, "messages": messages}, "/tokenize").json()["tokens"]
    reply = server.post({"model": MODEL, "messages": messages, "max_tokens": 1})
    assert reply.status_code == 200, reply.text
    visual = reply.json()["usage"]["visual_tokens_per_stage"]
    assert reply.json()["usage"]["prompt_tokens"] == len(tokens) + (visual[0] - 1 if -200 in tokens else 0)
    return list(tokens)


@pytest.mark.parametrize("typed", ["<image>", "<ROUTER>", "a<ROUTER>b<image>c", "</s>", "<image>\n<ROUTER>"])
@pytest.mark.parametrize("has_image", [True, False])
def test_markers_that_users_type_are_text(server: RunningServer, llm: LLM, typed: str, has_image: bool) -> None:
    tokenizer, config = llm.processor.tokenizer, llm.model.prompt
    assert tokenizer is not None

    def messages(word: str) -> list[dict[str, Any]]:
        text = {"type": "text", "text": f"What is {word} here?"}
        question = [Ask().messages[0]["content"][0], text] if has_image else [text]
        return [{"role": "system", "content": f"Say {word}."}, {"role": "user", "content": question}]

    ids, plain = ids_of(server, messages(typed)), ids_of(server, messages("QQQ"))
    special = {-200, config.router_token_id, config.image_token_id, *config.eos_token_ids} - {None}
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert ids.count(-200) == has_image and ids.count(config.router_token_id) == has_image
    assert tokenizer.decode([i for i in ids if i >= 0], True).count(typed) == 2


def test_system_and_developer_messages(server: RunningServer) -> None:
    """Those at the beginning are one, as in Python; Vicuna's form has no place for later ones."""
    question = {"role": "user", "content": "Count."}
    texts = ["One.", "Two.", "Three."]
    roles = ["system", "system", "developer"]
    several = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    joined = {"role": "system", "content": "\n".join(texts)}
    assert ids_of(server, [*several, question]) == ids_of(server, [joined, question])
    assert ids_of(server, [{"role": "developer", "content": "One."}, question]) == ids_of(
        server, [{"role": "system", "content": "One."}, question]
    )
    for role in ("system", "developer"):
        late = [question, {"role": role, "content": "One."}, question]
        reply = server.post({"model": MODEL, "messages": late, "max_tokens": 1})
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert "a system message follows others, expected it first" in error["message"] and error["param"] == "messages"


def test_a_url_by_itself(server: RunningServer) -> None:
    """As some clients send it, instead of an object with the URL."""
    body = Ask().body()
    expected = server.post(body).json()
    part = body["messages"][0]["content"][0]
    part["image_url"] = part["image_url"]["url"]
    reply = server.post(body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"] == expected["choices"]
    assert reply.json()["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    part["image_url"] = 7
    message = server.post(body).json()["error"]["message"]
    assert message == "messages.0.content.0.image_url: expected an object or a string, got 7"
