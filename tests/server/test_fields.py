"""Fields of OpenAI's and vLLM's requests: what changes nothing is accepted, everything else is refused by its name."""

from __future__ import annotations

import typing
from typing import Any

import openai.types.chat as openai_chat
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from dpn_rt.server.errors import error_reply
from dpn_rt.server.protocol import ChatRequest, CompletionRequest
from tests.server.conftest import MODEL, Ask, RunningServer

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "a red circle", "max_tokens": 1}
URLS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}


def optional_fields(typed_dict: Any) -> list[str]:
    hints = typing.get_type_hints(typed_dict, include_extras=True)
    return sorted(name for name, hint in hints.items() if typing.get_origin(hint) is not typing.Required)


OPENAI_FIELDS = {
    "chat": optional_fields(chat_create_params.CompletionCreateParamsNonStreaming),
    "completion": optional_fields(completion_create_params.CompletionCreateParamsNonStreaming),
}
OPENAI_DEFAULTS: dict[str, list[tuple[str, Any]]] = {
    "chat": [
        ("function_call", "none"), ("function_call", "auto"), ("tool_choice", "none"), ("tool_choice", "auto"),
        ("functions", []), ("tools", []), ("parallel_tool_calls", True), ("logit_bias", {}), ("logprobs", False),
        ("modalities", ["text"]), ("response_format", {"type": "text"}), ("reasoning_effort", "none"),
        ("reasoning_effort", "medium"), ("verbosity", "medium"), ("service_tier", "auto"),
        ("service_tier", "default"), ("prompt_cache_retention", "in_memory"), ("prompt_cache_retention", "24h"),
        ("prompt_cache_options", {"mode": "implicit", "ttl": "30m"}), ("store", False), ("metadata", {}), ("n", 1),
        ("frequency_penalty", 0), ("presence_penalty", 0), ("temperature", 1), ("top_p", 1), ("stream", False),
        ("stream_options", {}), ("top_logprobs", 0), ("user", "me"), ("safety_identifier", "me"),
        ("prompt_cache_key", "mine"),
    ],
    "completion": [
        ("best_of", 1), ("echo", False), ("suffix", ""), ("logit_bias", {}), ("n", 1), ("frequency_penalty", 0),
        ("presence_penalty", 0), ("temperature", 1), ("top_p", 1), ("stream", False), ("stream_options", {}),
        ("max_tokens", 16), ("user", "me"),
    ],
}  # fmt: skip
VLLM_NEUTRAL: list[tuple[str, Any]] = [
    ("use_beam_search", False), ("length_penalty", 1.0), ("length_penalty", 1), ("early_stopping", False),
    ("spaces_between_special_tokens", True), ("bad_words", []), ("logits_processors", []), ("stop_token_ids", []),
    ("return_token_ids", False), ("return_tokens_as_token_ids", False), ("include_reasoning", True),
    ("thinking_token_budget", -1), ("kv_transfer_params", {}), ("vllm_xargs", {}), ("extra_body", {}),
    ("stream_interval", 1), ("top_k", -1), ("top_k", 0), ("min_p", 0), ("repetition_penalty", 1.0),
    ("min_tokens", 0), ("ignore_eos", False), ("skip_special_tokens", True), ("include_stop_str_in_output", False),
    ("priority", 0), ("echo", False), ("session_id", "mine"), ("best_of", 1), ("guided_choice", []),
    ("structured_outputs", {}),
]  # fmt: skip
VLLM_NEUTRAL_CHAT: list[tuple[str, Any]] = [
    ("add_generation_prompt", True), ("continue_final_message", False), ("chat_template_kwargs", {}),
    ("mm_processor_kwargs", {}), ("media_io_kwargs", {}), ("documents", []), ("add_special_tokens", False),
    ("return_prompt_text", False),
]  # fmt: skip
VLLM_NULL = [
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend",
    "guided_whitespace_pattern", "structured_outputs", "structural_tag", "prompt_logprobs", "allowed_token_ids",
    "logprob_token_ids", "truncate_prompt_tokens", "truncation_side", "repetition_detection", "request_id",
    "cache_salt", "ec_transfer_params", *dict.fromkeys(name for name, _ in VLLM_NEUTRAL),
]  # fmt: skip
VLLM_NULL_CHAT = ["chat_template", *dict.fromkeys(name for name, _ in VLLM_NEUTRAL_CHAT)]
REFUSED: dict[str, list[tuple[str, Any]]] = {
    "chat": [
        ("use_beam_search", True), ("use_beam_search", 0), ("length_penalty", 0.5), ("guided_json", {}),
        ("guided_choice", ["a", "b"]), ("structured_outputs", {"choice": ["a"]}), ("bad_words", ["a"]),
        ("prompt_logprobs", 1), ("cache_salt", "salt"), ("chat_template", "{{ messages }}"), ("echo", True),
        ("mm_processor_kwargs", {"num_crops": 4}), ("add_special_tokens", True), ("return_token_ids", True),
        ("reasoning_effort", "enormous"), ("reasoning_effort", 3), ("verbosity", "silent"), ("best_of", 2),
        ("web_search_options", {}), ("moderation", {"model": "m"}),
        ("prediction", {"type": "content", "content": "a"}), ("audio", {"voice": "alloy", "format": "wav"}),
        ("modalities", ["text", "audio"]), ("logit_bias", {"1": 5}), ("tools", [{"type": "function"}]),
        ("function_call", {"name": "f"}), ("tool_choice", "required"), ("truncate_prompt_tokens", 5),
        ("documents", [{"text": "a"}]), ("spaces_between_special_tokens", False), ("kv_transfer_params", {"a": 1}),
    ],
    "completion": [
        ("echo", True), ("suffix", "end"), ("best_of", 2), ("best_of", True), ("prompt_embeds", "AAAA"),
        ("use_beam_search", True), ("guided_regex", "a+"), ("add_special_tokens", False), ("logit_bias", {"1": 5}),
        ("response_format", {"type": "json_object"}), ("allowed_token_ids", [1]), ("extra_body", {"top_k": 1}),
    ],
}  # fmt: skip
UNKNOWN = {
    "chat": ["temprature", "prompt", "suffix", "num_beams", "Model", "a.b"],
    "completion": ["messages", "tools", "chat_template_kwargs", "verbosity"],
}


def body(kind: str, **fields: Any) -> dict[str, Any]:
    return {**(CHAT if kind == "chat" else COMPLETION), **fields}


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_every_field_of_openai_may_be_null(server: RunningServer, kind: str) -> None:
    """Alone, so that a message names it, and all together, as a client may send them that leaves nothing out."""
    fields = OPENAI_FIELDS[kind]
    assert len(fields) > 10
    for field in fields:
        reply = server.post(body(kind, **{field: None}), URLS[kind])
        assert reply.status_code == 200, reply.text
    reply = server.post(body(kind, **{**dict.fromkeys(fields), "max_tokens": 1}), URLS[kind])
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_every_field_of_openai_has_a_value_that_is_accepted(server: RunningServer, kind: str) -> None:
    for field, value in OPENAI_DEFAULTS[kind]:
        assert field in OPENAI_FIELDS[kind]
        reply = server.post(body(kind, **{field: value}), URLS[kind])
        assert reply.status_code == 200, reply.text


def test_wishes_for_effort_are_accepted() -> None:
    """All that OpenAI's types have, so that a client written for a model that reasons gets its answer."""
    hints = typing.get_type_hints(chat_create_params.CompletionCreateParamsNonStreaming)
    for field in ("reasoning_effort", "verbosity"):
        values = [value for each in typing.get_args(hints[field]) for value in typing.get_args(each)]
        assert "low" in values and "high" in values
        for value in values:
            assert getattr(ChatRequest.model_validate(body("chat", **{field: value})), field) == value


PARTS: list[tuple[Any, dict[str, Any]]] = [
    (openai_chat.ChatCompletionContentPartTextParam, {"type": "text", "text": "Hello"}),
    (openai_chat.ChatCompletionContentPartImageParam, Ask().messages[0]["content"][0]),
]


@pytest.mark.parametrize(("part_type", "part"), PARTS, ids=["text", "image"])
def test_fields_of_parts_may_be_null(server: RunningServer, part_type: Any, part: dict[str, Any]) -> None:
    part = {**dict.fromkeys(optional_fields(part_type)), "uuid": None, **part}
    if "image_url" in part:
        url_type = typing.get_type_hints(part_type)["image_url"]
        part["image_url"] = {**dict.fromkeys(optional_fields(url_type)), **part["image_url"]}
    reply = server.post(body("chat", messages=[{"role": "user", "content": [part]}]))
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("role", "message_type"),
    [
        ("system", openai_chat.ChatCompletionSystemMessageParam),
        ("user", openai_chat.ChatCompletionUserMessageParam),
        ("assistant", openai_chat.ChatCompletionAssistantMessageParam),
    ],
)
def test_fields_of_messages_may_be_null(server: RunningServer, role: str, message_type: Any) -> None:
    message = {**dict.fromkeys(optional_fields(message_type)), "role": role, "content": "Hello"}
    messages = [message] if role == "user" else [message, *CHAT["messages"]]
    reply = server.post(body("chat", messages=messages))
    assert reply.status_code == 200, reply.text
    reply = server.post(body("chat", messages=[*CHAT["messages"], reply_message(server), *CHAT["messages"]]))
    assert reply.status_code == 200, reply.text


def reply_message(server: RunningServer) -> dict[str, Any]:
    """A reply's message, with what vLLM's has beside."""
    message = server.post(body("chat")).json()["choices"][0]["message"]
    return {**message, "reasoning": None, "reasoning_content": None, "tool_calls": [], "annotations": None}


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_neutral_values_of_vllm_are_accepted(server: RunningServer, kind: str) -> None:
    is_chat = kind == "chat"
    values = [*VLLM_NEUTRAL, *(VLLM_NEUTRAL_CHAT if is_chat else [("add_special_tokens", True)])]
    nulls = [*VLLM_NULL, *(VLLM_NULL_CHAT if is_chat else ["add_special_tokens", "prompt_embeds", "response_format"])]
    expected = server.post(body(kind, temperature=0), URLS[kind]).json()["choices"]
    for field, value in [*values, *((name, None) for name in nulls)]:
        reply = server.post(body(kind, temperature=0, **{field: value}), URLS[kind])
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"] == expected, field


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_other_values_are_refused_by_name(kind: str) -> None:
    for field, value in REFUSED[kind]:
        message = refusal(kind, {field: value})
        assert message.startswith(f"{field}: not supported, expected it left out or null"), message


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_unknown_fields_are_refused_by_name(kind: str) -> None:
    for field in UNKNOWN[kind]:
        for value in (None, 1, {"a": "b"}):
            message = refusal(kind, {field: value})
            assert message.startswith(f"unknown or unsupported field {field}:"), message


def test_unknown_fields_of_messages_and_options_are_refused_by_place() -> None:
    part = {"type": "text", "text": "a", "extra": 1}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"messages": [{"role": "user", "content": "a", "mood": "good"}]}, "messages.0.mood"),
        ({"messages": [{"role": "user", "content": [part]}]}, "messages.0.content.0.extra"),
        ({"stream": True, "stream_options": {"include_cost": True}}, "stream_options.include_cost"),
    ]
    for fields, place in cases:
        assert refusal("chat", fields).startswith(f"unknown or unsupported field {place}:")


def refusal(kind: str, fields: dict[str, Any]) -> str:
    """The message with which a request is refused."""
    model = ChatRequest if kind == "chat" else CompletionRequest
    with pytest.raises(ValueError) as caught:
        model.model_validate(body(kind, **fields))
    reply = error_reply(caught.value)
    assert reply.status == 400
    return str(reply.body["error"]["message"])
