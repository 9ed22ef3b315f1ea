"""Outputs as they finish: each prompt once, taken when there is room, errors beside answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.errors import BatchError, DeviceError, RequestError
from dpn_rt.outputs import RequestOutput
from tests.engine.answers import all_logprobs, assert_ids_are
from tests.engine.models import random_prompt, write_random_engine

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(write_random_engine(tmp_path_factory.mktemp("engines") / "adaptive"), max_num_seqs=3)


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, Any]]:
    generator = np.random.default_rng(torch.initial_seed())
    return [random_prompt(generator, (4, 4)) for _ in range(20)]


def ids(result: object) -> list[int]:
    assert isinstance(result, RequestOutput)
    return result.outputs[0].token_ids


def test_they_are_those_of_generate(llm: LLM, prompts: list[dict[str, Any]]) -> None:
    expected = llm.generate(prompts, dataclasses.replace(GREEDY, logprobs=-1), use_tqdm=False)
    results = dict(llm.as_completed(iter(prompts), GREEDY))
    for position, output in enumerate(expected):
        assert_ids_are(ids(results[position]), ids(output), all_logprobs(output))


def test_lower_priorities_go_first(llm: LLM, prompts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a list all are compared, of an iterator those that have been taken; outputs keep the order of the prompts."""
    priorities = [-(position % 3) for position in range(20)]
    expected = llm.generate(prompts, dataclasses.replace(GREEDY, logprobs=-1), use_tqdm=False)
    submitted: list[int] = []
    add_request = llm.engine.add_request

    def add(*arguments: Any, priority: int) -> None:
        submitted.append(priority)
        add_request(*arguments, priority=priority)

    monkeypatch.setattr(llm.engine, "add_request", add)
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False, priority=priorities)
    assert submitted == sorted(priorities)
    taken = dict(llm.as_completed(iter(prompts), GREEDY, iter(priorities)))
    assert submitted[20:] == priorities
    for position, output in enumerate(expected):
        for each in (outputs[position], taken[position]):
            assert_ids_are(ids(each), ids(output), all_logprobs(output))
    list(llm.stream(prompts[0], GREEDY, priority=7))
    llm.generate(prompts[:2], GREEDY, use_tqdm=False, priority=5)
    llm.generate(prompts[:2], GREEDY, use_tqdm=False)
    assert submitted[40:] == [7, 5, 5, 0, 0]


@pytest.mark.parametrize("priority", ["a", 1.5, True, [1], [0, "a"], [0, None, 1]])
def test_what_is_no_priority(llm: LLM, prompts: list[dict[str, Any]], priority: Any) -> None:
    with pytest.raises(RequestError, match="priorit"):
        llm.generate(prompts[:2], GREEDY, use_tqdm=False, priority=priority)
    with pytest.raises(RequestError, match="priority"):
        next(iter(llm.stream(prompts[0], GREEDY, priority=priority)))


def test_short_answers_come_before_long_ones(llm: LLM, prompts: list[dict[str, Any]]) -> None:
    params = [SamplingParams(temperature=0, max_tokens=20 if i == 0 else 2, ignore_eos=True) for i in range(20)]
    positions = [position for position, _ in llm.as_completed(prompts, iter(params))]
    assert sorted(positions) == list(range(20)) and positions.index(0) > 2


def test_prompts_are_taken_when_there_is_room(llm: LLM, prompts: list[dict[str, Any]]) -> None:
    taken = 0

    def each() -> Iterator[dict[str, Any]]:
        nonlocal taken
        for prompt in prompts:
            taken += 1
            yield prompt

    most = 0
    for done, _ in enumerate(llm.as_completed(each(), GREEDY)):
        most = max(most, taken - done)
    assert taken == 20 and most <= 2 * llm.engine.max_num_seqs + 1


def test_functions_make_prompts_in_their_turn(llm: LLM, prompts: list[dict[str, Any]]) -> None:
    makers = [lambda prompt=prompt: llm.processor.process(prompt) for prompt in prompts[:5]]
    assert len(list(llm.as_completed(makers, GREEDY))) == 5


def test_an_error_stands_beside_the_answers(llm: LLM, prompts: list[dict[str, Any]]) -> None:
    bad = {**prompts[1], "route": [9, 9, 9]}
    results = dict(llm.as_completed([prompts[0], bad, prompts[2]], GREEDY))
    assert isinstance(results[1], RequestError) and "route[0]=9" in str(results[1])
    assert all(isinstance(results[position], RequestOutput) for position in (0, 2))
    assert list(llm.as_completed([], GREEDY)) == []


def test_one_prompt_and_what_is_none(llm: LLM, prompts: list[dict[str, Any]]) -> None:
    """As `generate` takes it: a text is not a list of letters, nor an object one of its keys."""
    (number, result), *others = llm.as_completed(prompts[0], GREEDY)
    assert number == 0 and not others and len(ids(result)) == GREEDY.max_tokens
    ((_, refused),) = llm.as_completed("two words", GREEDY)
    assert isinstance(refused, RequestError) and "this engine has no tokenizer" in str(refused)
    for wrong in (None, 5, b"words"):
        with pytest.raises(RequestError, match="^prompts: expected a prompt or a list of them, got "):
            next(llm.as_completed(wrong, GREEDY))  # type: ignore[arg-type]


def test_closing_it_frees_the_engine(llm: LLM, prompts: list[dict[str, Any]]) -> None:
    with closing(llm.as_completed(prompts, GREEDY)) as results:
        next(results)
    assert llm.engine.num_unfinished == llm.engine.num_running == 0


@pytest.mark.parametrize("params", [[GREEDY], [GREEDY, None], [GREEDY, "greedy"]])
def test_params_are_for_every_prompt(llm: LLM, prompts: list[dict[str, Any]], params: list[Any]) -> None:
    with pytest.raises(RequestError, match=r"^sampling_params of prompt 1: expected SamplingParams, got "):
        list(llm.as_completed(prompts[:3], params))
    assert llm.engine.num_unfinished == 0


def test_a_failing_source_frees_the_engine(llm: LLM, prompts: list[dict[str, Any]]) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield prompts[0]
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(llm.as_completed(broken(), GREEDY))
    assert llm.engine.num_unfinished == 0


def test_an_engine_that_has_stopped_ends_it(
    llm: LLM, prompts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`generate` keeps what was answered before instead."""
    monkeypatch.setattr(llm.engine, "failure", DeviceError("the engine has stopped"))
    with pytest.raises(DeviceError, match="has stopped"):
        list(llm.as_completed(prompts, GREEDY))
    with pytest.raises(BatchError, match="3 of 3 prompts failed"):
        llm.generate(prompts[:3], GREEDY, use_tqdm=False)
    assert llm.engine.num_unfinished == 0
