"""litellm works unchanged and gets the answers of `LLM`."""

from __future__ import annotations

from typing import Any

import pytest

from dpn_rt import LLM, SamplingParams
from dpn_rt.outputs import RequestOutput
from tests.server.conftest import MODEL, Ask, RunningServer
from tests.skips import need_harness

need_harness("litellm")

import litellm  # noqa: E402

ASK = Ask(1)


@pytest.fixture
def ask(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")

    def complete(**fields: Any) -> Any:
        options = {"model": f"openai/{MODEL}", "messages": ASK.messages, "max_tokens": 8, "temperature": 0, **fields}
        return litellm.completion(**options, api_base=f"{server.url}/v1", api_key="none", max_retries=0)

    return complete


def expected(llm: LLM, **params: Any) -> RequestOutput:
    return llm.chat(ASK.local_messages, SamplingParams(**{"temperature": 0, "max_tokens": 8, **params}))[0]


def test_an_answer(ask: Any, llm: LLM) -> None:
    output, reply = expected(llm), ask()
    assert reply.choices[0].message.content == output.outputs[0].text
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 8
    assert reply.usage.prompt_tokens == len(output.prompt_token_ids) + 255


def test_a_stream_with_usage(ask: Any, llm: LLM) -> None:
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == expected(llm).outputs[0].text
    assert chunks[-1].usage.completion_tokens == 8


def test_several_answers_with_a_seed(ask: Any, llm: LLM) -> None:
    reply = ask(n=3, temperature=1, seed=3)
    drawn = expected(llm, n=3, temperature=1, seed=3)
    assert [choice.message.content for choice in reply.choices] == [c.text for c in drawn.outputs]


def test_stop_strings(ask: Any, llm: LLM) -> None:
    text = expected(llm).outputs[0].text
    stop = text[len(text) // 2 :][:2]
    reply = ask(stop=[stop])
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (text[: text.index(stop)], "stop")


def test_log_probabilities(ask: Any, llm: LLM) -> None:
    entries = ask(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    output = expected(llm, logprobs=3).outputs[0]
    assert output.logprobs is not None
    assert [len(entry.top_logprobs) for entry in entries] == [3] * 8
    for entry, logprobs, token_id in zip(entries, output.logprobs, output.token_ids, strict=True):
        assert entry.logprob == pytest.approx(float(logprobs[token_id]), abs=1e-5)


ELSEWHERE = {"type": "image_url", "image_url": {"url": "http://a/b.png"}}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"temperature": -1}, litellm.BadRequestError, "temperature=-1.*expected from 0"),
        ({"model": "openai/other"}, litellm.NotFoundError, "expected 'tiny'"),
        ({"messages": [{"role": "user", "content": [ELSEWHERE]}]}, litellm.BadRequestError, "http://a/b.png"),
    ],
    ids=["value", "model", "image"],
)
def test_classes_of_errors(ask: Any, fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ask(**fields)
