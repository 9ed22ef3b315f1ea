"""LangChain's client works unchanged and gets the answers of `LLM`."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from dpn_rt import LLM, SamplingParams
from dpn_rt.outputs import RequestOutput
from tests.server.conftest import MODEL, Ask, RunningServer
from tests.skips import NO_LANGCHAIN

langchain_core = pytest.importorskip("langchain_core.messages", reason=NO_LANGCHAIN)
langchain = pytest.importorskip("langchain_openai", reason=NO_LANGCHAIN)

ASK = Ask(1)


@pytest.fixture
def chat(server: RunningServer) -> Any:
    def make(**options: Any) -> Any:
        fields = {"model": MODEL, "max_tokens": 8, "temperature": 0, "max_retries": 0, **options}
        return langchain.ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", **fields)

    return make


def expected(llm: LLM, **params: Any) -> RequestOutput:
    return llm.chat(ASK.local_messages, SamplingParams(**{"temperature": 0, "max_tokens": 8, **params}))[0]


def test_an_answer(chat: Any, llm: LLM) -> None:
    output, reply = expected(llm), chat().invoke(ASK.messages)
    assert reply.content == output.outputs[0].text
    assert reply.response_metadata["finish_reason"] == "length"
    assert reply.usage_metadata["output_tokens"] == 8
    assert reply.usage_metadata["input_tokens"] == len(output.prompt_token_ids) + 255


def test_parts_of_langchains_own(chat: Any, llm: LLM) -> None:
    """Images in LangChain's form become data URLs on the way."""
    _, _, data = ASK.messages[0]["content"][0]["image_url"]["url"].partition("base64,")
    content = [{"type": "image", "base64": data, "mime_type": "image/png"}, {"type": "text", "text": ASK.text}]
    assert chat().invoke([{"role": "user", "content": content}]).content == expected(llm).outputs[0].text


def test_a_stream_with_usage(chat: Any, llm: LLM) -> None:
    chunks = list(chat(stream_usage=True).stream(ASK.messages))
    assert "".join(chunk.content for chunk in chunks) == expected(llm).outputs[0].text
    assert [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata] == [8]


def test_a_batch(chat: Any, llm: LLM) -> None:
    replies = chat().batch([ASK.messages] * 4)
    assert [reply.content for reply in replies] == [expected(llm).outputs[0].text] * 4


def test_several_answers_with_a_seed(chat: Any, llm: LLM) -> None:
    message = langchain_core.HumanMessage(ASK.messages[0]["content"])
    [drawn] = chat(n=3, temperature=1, seed=3).generate([[message]]).generations
    output = expected(llm, n=3, temperature=1, seed=3)
    assert [generation.text for generation in drawn] == [completion.text for completion in output.outputs]


def test_stop_strings_and_log_probabilities(chat: Any, llm: LLM) -> None:
    text = expected(llm).outputs[0].text
    stop = text[len(text) // 2 :][:2]
    assert chat().invoke(ASK.messages, stop=[stop]).content == text[: text.index(stop)]
    entries = chat(logprobs=True, top_logprobs=3).invoke(ASK.messages).response_metadata["logprobs"]["content"]
    output = expected(llm, logprobs=3).outputs[0]
    assert output.logprobs is not None
    for entry, logprobs, token_id in zip(entries, output.logprobs, output.token_ids, strict=True):
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] == pytest.approx(float(logprobs[token_id]), abs=1e-5)


def test_classes_of_errors(chat: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature=-1"):
        chat(temperature=-1).invoke(ASK.messages)
    with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
        chat(model="other").invoke(ASK.messages)
