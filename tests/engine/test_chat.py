"""`LLM.chat` on the small trained checkpoint: what Python offers as HTTP does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.engine.loader import check_device
from dpn_rt.errors import BatchError, DpnError, RequestError
from dpn_rt.format.flops import prefill_flops

ROOT = Path(__file__).parents[2]

GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    engine = tmp_path_factory.mktemp("engines") / "tiny"
    build_engine(ROOT / "examples/tiny_dpn/checkpoint", engine, dtype="float32")
    return LLM(engine)


def ask(question: str, scene: int = 1) -> list[dict[str, Any]]:
    image = Image.open(ROOT / f"examples/images/scene_{scene}.png")
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def test_a_bad_conversation_leaves_the_others_alone(llm: LLM) -> None:
    good = [ask("What is this?"), ask("How many are there?", 2)]
    bad: list[Any] = [
        ask("hi \ud83d"),
        [{"role": "tool", "content": "x"}],
        [{"role": "assistant", "content": "x"}],
        "text",
        [{"role": "user", "content": [{"type": "image_url", "image_url": "nowhere"}]}],
    ]
    with pytest.raises(BatchError) as caught:
        llm.chat([good[0], *bad, good[1]], GREEDY)
    assert sorted(caught.value.errors) == [1, 2, 3, 4, 5]
    assert all(isinstance(error, RequestError) for error in caught.value.errors.values())
    first, *_, last = caught.value.outputs
    for output, conversation in ((first, good[0]), (last, good[1])):
        assert output.outputs[0].token_ids == llm.chat(conversation, GREEDY)[0].outputs[0].token_ids  # type: ignore[attr-defined]


@pytest.mark.parametrize("prompt", ["hi \ud83d", "\udce9", "a\udfffb"])
def test_halves_of_surrogate_pairs_in_prompts(llm: LLM, prompt: str) -> None:
    with pytest.raises(BatchError) as caught:
        llm.generate([prompt, "USER: hi ASSISTANT:"], GREEDY, use_tqdm=False)
    assert list(caught.value.errors) == [0] and "half of a surrogate pair" in str(caught.value.errors[0])
    assert caught.value.outputs[1] is not None
    with pytest.raises(RequestError, match="stop: character"):
        SamplingParams(stop=[prompt])


def test_routes_and_biases(llm: LLM) -> None:
    conversation = ask("What is this?")
    output = llm.chat(conversation, GREEDY, route=[2, 1, 0])[0]
    assert output.pyramid.experts == [2, 1, 0]
    fast, exact = (llm.chat([conversation] * 2, GREEDY, router_bias=bias)[1].pyramid for bias in (1000, -1000))
    assert fast.experts == [2, 2, 2] and exact.experts == [0, 0, 0]
    with pytest.raises(RequestError, match=r"route=\[9\]"):
        llm.chat(conversation, GREEDY, route=[9])


def test_kept_rows_and_priorities(llm: LLM) -> None:
    """The model has a trained reduction, so `kept` is refused; that it is heard of shows that it is passed on. Such
    a model's own list may be given back all the same."""
    with pytest.raises(RequestError, match="kept: the request has no reduction that keeps rows"):
        llm.chat(ask("What is this?"), GREEDY, kept=[[1, 2]])
    kept = llm.chat(ask("What is this?"), GREEDY)[0].pyramid.kept
    assert kept == [None] * 3 == llm.chat(ask("What is this?"), GREEDY, kept=kept)[0].pyramid.kept
    conversations = [ask("What is this?"), ask("How many are there?", 2)]
    outputs = llm.chat(conversations, GREEDY, priority=[1, 0])
    for output, conversation in zip(outputs, conversations, strict=True):
        assert output.outputs[0].token_ids == llm.chat(conversation, GREEDY, priority=-3)[0].outputs[0].token_ids
    with pytest.raises(RequestError, match="2 prompts with 1 priorities"):
        llm.chat(conversations, GREEDY, priority=[1])


@pytest.mark.parametrize("bad", [object(), lambda: 1, {"a": object()}, Image.new("RGB", (2, 2))])
def test_messages_show_no_addresses(llm: LLM, bad: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: llm.chat(bad, GREEDY),
        lambda: llm.chat([{"role": bad, "content": "a"}], GREEDY),
        lambda: llm.chat([{"role": "user", "content": [bad]}], GREEDY),
        lambda: llm.chat([{"role": "user", "content": [{"type": "image_pil", "image": bad}]}], GREEDY),
        lambda: llm.chat(ask("a"), bad),
        lambda: llm.chat(ask("a"), [bad]),
        lambda: llm.chat(ask("a"), GREEDY, route=bad),
        lambda: llm.chat(ask("a"), GREEDY, route=[bad] * 3),
        lambda: llm.chat(ask("a"), GREEDY, router_bias=bad),
        lambda: llm.chat(ask("a"), GREEDY, reduce=bad),
        lambda: llm.chat(ask("a"), GREEDY, priority=bad),
        lambda: llm.chat(ask("a"), GREEDY, add_generation_prompt=bad),
        lambda: llm.generate(bad, GREEDY, use_tqdm=False),
        lambda: llm.generate({"prompt_token_ids": [bad]}, GREEDY, use_tqdm=False),
        lambda: llm.generate({"prompt": "a", "multi_modal_data": {"image": [bad, [bad]]}}, GREEDY, use_tqdm=False),
        lambda: llm.generate({"prompt": "a", "other": bad}, GREEDY, use_tqdm=False),
        lambda: SamplingParams(temperature=bad),
        lambda: SamplingParams(stop=[bad]),
        lambda: SamplingParams(stop_token_ids=[bad]),
        lambda: LLM(bad),
        lambda: check_device(bad, llm.model, has_plans=False),
        lambda: LLM("nowhere", max_num_seqs=bad),
        lambda: LLM("nowhere", gpu_memory_utilization=bad),
        lambda: LLM("nowhere", limit_mm_per_prompt=bad),
        lambda: LLM("nowhere", reduce=bad),
    ]
    for number, call in enumerate(calls):
        with pytest.raises(DpnError) as caught:
            call()
        assert " at 0x" not in str(caught.value), number


def test_flops_are_those_of_the_rows(llm: LLM) -> None:
    output = llm.chat(ask("What is this?"), GREEDY)[0]
    flops, rows = output.pyramid.flops, output.pyramid.kv_lengths
    assert flops is not None and flops.prefill == prefill_flops(llm.model, rows)
    assert flops.dense_prefill == prefill_flops(llm.model, [rows[0]] * len(rows))
    assert flops.saved == 1 - flops.prefill / flops.dense_prefill and 0 < flops.saved < 1
    text = llm.generate("USER: hi ASSISTANT:", GREEDY, use_tqdm=False)[0].pyramid.flops
    assert text is not None and text.prefill == text.dense_prefill and text.saved == 0


def test_an_answer_goes_on(llm: LLM) -> None:
    question = ask("What word is written?")
    answer = llm.chat(question, GREEDY)[0].outputs[0]
    begun = [*question, {"role": "assistant", "content": answer.text.strip()}]
    output = llm.chat(begun, GREEDY, continue_final_message=True)[0]
    assert output.prompt_token_ids[-1] != llm.chat(question, GREEDY)[0].prompt_token_ids[-1]
    assert output.outputs[0].token_ids == [2], "the answer was complete"
