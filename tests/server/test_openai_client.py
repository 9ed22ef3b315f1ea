"""The official client works unchanged and gets the answers of `LLM`."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from dpn_rt import LLM, SamplingParams
from dpn_rt.outputs import RequestOutput
from examples.tiny_dpn.data import QUESTIONS
from tests.server.conftest import MODEL, Ask, RunningServer

ASKS = [Ask(scene, text) for scene, text in enumerate(QUESTIONS.values())]


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def expected(llm: LLM, ask: Ask, **params: Any) -> RequestOutput:
    return llm.chat(ask.local_messages, SamplingParams(**{"temperature": 0, "max_tokens": 8, **params}))[0]


@pytest.mark.parametrize("ask", ASKS, ids=list(QUESTIONS))
def test_answers_are_those_of_the_library(client: openai.OpenAI, llm: LLM, ask: Ask) -> None:
    output = expected(llm, ask)
    reply = client.chat.completions.create(model=MODEL, messages=ask.messages, max_tokens=8, temperature=0)  # type: ignore[arg-type]
    assert reply.choices[0].message.content == output.outputs[0].text
    assert reply.choices[0].finish_reason == output.outputs[0].finish_reason
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(output.outputs[0].token_ids)
    assert reply.usage.prompt_tokens == len(output.prompt_token_ids) + 255
    assert reply.usage.visual_tokens_per_stage == output.pyramid.visual_tokens  # type: ignore[attr-defined]
    pyramid = reply.pyramid  # type: ignore[attr-defined]
    assert pyramid["experts"] == output.pyramid.experts
    for probs, of_library in zip(pyramid["probs"], output.pyramid.probs, strict=True):
        assert probs == pytest.approx(of_library, abs=1e-4)
    assert 0 <= pyramid["flops"]["saved"] < 1


@pytest.mark.parametrize("ask", ASKS[:4])
def test_streams_join_to_the_whole(client: openai.OpenAI, llm: LLM, ask: Ask) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=ask.messages,  # type: ignore[arg-type]
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    output = expected(llm, ask)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == output.outputs[0].text
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 8
    assert [bool(chunk.choices) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-2].pyramid["experts"] == output.pyramid.experts  # type: ignore[attr-defined]
    assert chunks[-2].timings["total"] > 0  # type: ignore[attr-defined]


def test_every_chunk_of_a_plain_stream_has_a_choice(client: openai.OpenAI, llm: LLM) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=ASKS[0].messages, max_tokens=8, temperature=0, stream=True
    )  # type: ignore[call-overload]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == expected(llm, ASKS[0]).outputs[0].text


def test_a_reply_can_be_sent_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=ASKS[0].messages, max_tokens=4)  # type: ignore[arg-type]
    again = [*ASKS[0].messages, first.choices[0].message, {"role": "user", "content": "And the number?"}]
    reply = client.chat.completions.create(model=MODEL, messages=again, max_tokens=4)  # type: ignore[arg-type]
    assert reply.usage is not None and first.usage is not None
    assert reply.usage.prompt_tokens > first.usage.prompt_tokens


def test_values_that_ask_for_nothing_are_taken(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=1,
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        logit_bias={},
        modalities=["text"],
    )
    assert reply.choices


def test_tokens_of_log_probabilities_make_up_the_text(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "a red circle", "max_tokens": 12, "logprobs": 2, "seed": 5}
    whole = client.completions.create(**options)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    text = whole.choices[0].text
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not token.startswith(("bytes:", "<")):
            assert text[offset:].startswith(token)
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**options, stream=True)]
    streamed = [offset for chunk in chunks if chunk is not None for offset in chunk.text_offset or ()]
    assert streamed == logprobs.text_offset


def test_several_prompts_stream_together(client: openai.OpenAI) -> None:
    prompts = ["a red circle", "two blue squares"]
    stream = client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=24, stream=True, extra_body={"ignore_eos": True}
    )
    order = [choice.index for chunk in stream for choice in chunk.choices]
    assert set(order) == {0, 1}
    assert order.index(1) < len(order) - 1 - order[::-1].index(0), "the second begins before the first has ended"


def test_log_probabilities(client: openai.OpenAI, llm: LLM) -> None:
    output = expected(llm, ASKS[0], logprobs=3)
    reply = client.chat.completions.create(
        model=MODEL,
        messages=ASKS[0].messages,  # type: ignore[arg-type]
        max_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and output.outputs[0].logprobs is not None
    for token, entries, token_id in zip(
        logprobs.content, output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True
    ):
        assert token.logprob == pytest.approx(float(entries[token_id]), abs=1e-5)
        assert len(token.top_logprobs) == 3
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (top.logprob for top in token.top_logprobs), reverse=True
        )
    plain = client.chat.completions.create(model=MODEL, messages=ASKS[0].messages, max_tokens=2, logprobs=True)  # type: ignore[arg-type]
    assert plain.choices[0].logprobs is not None and plain.choices[0].logprobs.content is not None
    assert all(token.top_logprobs == [] for token in plain.choices[0].logprobs.content)


def test_stop_strings_and_several_completions(client: openai.OpenAI, llm: LLM) -> None:
    text = expected(llm, ASKS[1], max_tokens=24).outputs[0].text
    stop = text[len(text) // 2 :][:2]
    reply = client.chat.completions.create(
        model=MODEL,
        messages=ASKS[1].messages,
        max_tokens=24,
        temperature=0,
        stop=stop,  # type: ignore[arg-type]
    )
    assert reply.choices[0].message.content == text[: text.index(stop)]
    assert reply.choices[0].finish_reason == "stop"
    several = client.chat.completions.create(
        model=MODEL,
        messages=ASKS[1].messages,
        max_tokens=8,
        temperature=1,
        seed=3,
        n=3,  # type: ignore[arg-type]
    )
    drawn = expected(llm, ASKS[1], temperature=1, seed=3, n=3)
    assert [choice.message.content for choice in several.choices] == [c.text for c in drawn.outputs]
    assert [choice.index for choice in several.choices] == [0, 1, 2]


def test_forced_route_and_router_bias(client: openai.OpenAI) -> None:
    def route(**extra: Any) -> list[int]:
        reply = client.chat.completions.create(
            model=MODEL,
            messages=ASKS[2].messages,
            max_tokens=1,
            extra_body=extra,  # type: ignore[arg-type]
        )
        return reply.pyramid["experts"]  # type: ignore[attr-defined, no-any-return]

    assert route(route=[0, 1, 2]) == [0, 1, 2]
    assert route(router_bias=1000) == [2, 2, 2]
    assert route(router_bias=-1000) == [0, 0, 0]


def test_text_alone(client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6)
    prompts = ["USER: hello ASSISTANT:", "a red circle"]
    expected_texts = [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]
    reply = client.completions.create(model=MODEL, prompt=prompts, max_tokens=6, temperature=0)
    assert [choice.text for choice in reply.choices] == expected_texts
    chunks = list(client.completions.create(model=MODEL, prompt=prompts, max_tokens=6, temperature=0, stream=True))
    joined = ["".join(c.text for chunk in chunks for c in chunk.choices if c.index == i) for i in range(2)]
    assert joined == expected_texts
    chat = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=4)
    assert chat.pyramid is None  # type: ignore[attr-defined]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
        client.models.retrieve("other")


@pytest.mark.parametrize("skips", [True, False])
def test_offsets_are_those_of_the_text(client: openai.OpenAI, skips: bool) -> None:
    """Where special tokens are left out, and characters are those of several tokens."""
    seen = ""
    for seed in range(8):
        more = {"ignore_eos": True, "skip_special_tokens": skips}
        asked: dict[str, Any] = {"model": MODEL, "prompt": "a", "max_tokens": 100, "logprobs": 0, "extra_body": more}
        choice = client.completions.create(**asked, temperature=2, seed=seed).choices[0]
        found = choice.logprobs
        assert found is not None and found.text_offset is not None and found.tokens is not None
        assert found.text_offset == sorted(found.text_offset) and found.text_offset[-1] <= len(choice.text)
        for token, offset in zip(found.tokens, found.text_offset, strict=True):
            if not token.startswith(("bytes:", "<")):
                assert choice.text[offset:].startswith(token), (token, offset, choice.text)
        seen += choice.text
    assert any(ord(character) >= 128 and character != "\N{REPLACEMENT CHARACTER}" for character in seen)


def test_a_prompt_that_is_too_long_is_known_by_its_code(client: openai.OpenAI) -> None:
    prompts: list[str | list[int]] = ["a b " * 2000, "a" * 200_000, [5] * 5000]
    for prompt in prompts:
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model=MODEL, prompt=prompt)
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")


def test_null_counts_as_left_out(client: openai.OpenAI) -> None:
    more = {"ignore_eos": True, "max_tokens": None}
    reply = client.completions.create(model=MODEL, prompt="a", extra_body=more)
    assert reply.usage is not None and reply.usage.completion_tokens == 16
