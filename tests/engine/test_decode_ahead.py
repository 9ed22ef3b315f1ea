"""Decode steps that are queued before the host has read the tokens of the step before give the same answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.backends.kernels.decode_graphs import DecodeGraph
from dpn_rt.device.host import HostReadback
from dpn_rt.device.packing import Array
from dpn_rt.engine.engine import StepResult
from dpn_rt.errors import StepError
from dpn_rt.outputs import RequestOutput
from tests.engine.answers import all_logprobs, assert_ids_are, assert_pool_is_full
from tests.engine.models import MODEL, kv_bytes, random_prompt, write_random_engine
from tests.places import Place
from tests.skips import GPU_PRESENT

LENGTHS = (9, 1, 14, 2, 30, 11, 3, 14, 25, 6)

Prompt = dict[str, Any]


@pytest.fixture
def engine_dir(place: Place, tmp_path: Path) -> Path:
    return write_random_engine(tmp_path / "engine", dataclasses.replace(MODEL, dtype=place.dtype))


@pytest.fixture
def prompts() -> list[Prompt]:
    generator = np.random.default_rng(torch.initial_seed())
    grids = [(4, 4), None, (5, 5), None, (8, 8), None, (3, 7), None, (4, 4), None]
    made = [random_prompt(generator, grid) for grid in grids]
    for prompt, grid in zip(made, grids, strict=True):
        if grid is not None:
            prompt["route"] = [0, 1, 1]
    return made


def assert_as_alone(
    outputs: list[RequestOutput], engine_dir: Path, prompts: list[Prompt], params: list[SamplingParams]
) -> None:
    """The tokens that the CPU's runtime gives each prompt alone; of an aborted request its first ones."""
    llm = LLM(engine_dir, device="cpu")
    for output, prompt, one in zip(outputs, prompts, params, strict=True):
        alone = llm.generate(prompt, dataclasses.replace(one, logprobs=-1), use_tqdm=False)[0]
        for ids, completion in zip(ids_of(output), alone.outputs, strict=True):
            wanted = completion.token_ids[: len(ids)]
            if one.temperature == 0:
                assert_ids_are(ids, wanted, all_logprobs(dataclasses.replace(alone, outputs=[completion])))
            else:
                assert ids == wanted


def ids_of(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "top_p": 0.9, "seed": 5},
    {"temperature": 0.8, "top_k": 20, "seed": 6, "n": 3},
]


@pytest.mark.parametrize("max_num_seqs", [1, 4, 9])
def test_answers_are_those_of_the_cpu(place: Place, engine_dir: Path, prompts: list[Prompt], max_num_seqs: int) -> None:
    params = [
        SamplingParams(**KINDS[number % 3], max_tokens=length, ignore_eos=True) for number, length in enumerate(LENGTHS)
    ]
    llm = place.load(engine_dir, max_num_seqs=max_num_seqs)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [[len(ids) for ids in ids_of(output)] for output in outputs] == [[one.max_tokens] * one.n for one in params]
    if place.device is not None:
        assert_as_alone(outputs, engine_dir, prompts, params)
    assert_pool_is_full(llm)


def test_a_sequence_that_ends_by_its_token_goes_no_further(
    place: Place, engine_dir: Path, prompts: list[Prompt]
) -> None:
    llm = place.load(engine_dir)
    free = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = [ids[0] for ids in map(ids_of, llm.generate(prompts, free, use_tqdm=False))]
    # Each stops at its own token, some of them at the same step.
    stops = [ids[min(3 + number // 2, len(ids) - 1)] for number, ids in enumerate(expected)]
    params = [dataclasses.replace(free, stop_token_ids=[stop]) for stop in stops]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    if place.device is not None:
        for output, ids, stop in zip(outputs, expected, stops, strict=True):
            assert ids_of(output) == [ids[: ids.index(stop) + 1]]
            assert output.outputs[0].stop_reason == stop
    assert_pool_is_full(llm)


def test_a_completion_that_ends_before_the_others_of_its_prompt(place: Place, engine_dir: Path) -> None:
    llm = place.load(engine_dir)
    prompt: Prompt = {"prompt_token_ids": [1, 5, 9]}
    free = SamplingParams(n=3, temperature=1.0, seed=8, max_tokens=16, ignore_eos=True)
    (whole,) = llm.generate(prompt, free, use_tqdm=False)
    first, second, third = ids_of(whole)
    stop = next(token_id for token_id in first[2:] if token_id not in second[:-4] and token_id not in third[:-4])
    (output,) = llm.generate(prompt, dataclasses.replace(free, stop_token_ids=[stop]), use_tqdm=False)
    if place.device is not None:
        assert ids_of(output) == [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in (first, second, third)]
    assert_pool_is_full(llm)


def test_penalties_and_log_probabilities_wait_for_the_host(place: Place, engine_dir: Path) -> None:
    """In one batch with a request that cannot run ahead, each request gets the same result as alone."""
    params = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, repetition_penalty=1.5),
        SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=1),
        SamplingParams(temperature=0, max_tokens=4, min_tokens=3),
    ]
    prompts: list[Prompt] = [{"prompt_token_ids": [1, 5, 9 + number]} for number in range(4)]
    llm = place.load(engine_dir)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    if place.device is not None:
        assert_as_alone(outputs, engine_dir, prompts, params)
    assert_pool_is_full(llm)


def test_preempted_equals_alone(place: Place, engine_dir: Path) -> None:
    num_bytes = kv_bytes(70, 4, LLM(engine_dir, device="cpu").model)
    llm = place.load(engine_dir, kv_cache_bytes=num_bytes, block_size=4)
    prompts: list[Prompt] = [{"prompt_token_ids": [*range(start, start + 10)]} for start in range(3, 9)]
    params = [SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)] * len(prompts)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert llm.engine.num_preemptions > 0
    if place.device is not None:
        assert_as_alone(outputs, engine_dir, prompts, params)
    assert_pool_is_full(llm)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_one_is_aborted_while_its_next_step_is_queued(place: Place, engine_dir: Path, steps: int) -> None:
    llm = place.load(engine_dir)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts: list[Prompt] = [{"prompt_token_ids": [1, 5, 9 + number]} for number in range(3)]
    for number, prompt in enumerate(prompts):
        llm.engine.add_request(str(number), llm.processor.process(prompt), params)
    outputs = {}
    for _ in range(1 + steps):
        llm.engine.step()
    aborted = llm.engine.abort("1")
    assert aborted is not None and len(aborted.outputs[0].token_ids) == 1 + steps
    late = llm.processor.process(prompts[1])
    llm.engine.add_request("late", late, params)  # may get the KV blocks of the aborted one
    while llm.engine.num_unfinished:
        outputs.update({output.request_id: output for output in llm.engine.step().finished})
    assert set(outputs) == {"0", "2", "late"}
    if place.device is not None:
        ordered = [outputs["0"], outputs["late"], outputs["2"], aborted]
        assert_as_alone(ordered, engine_dir, [*prompts, prompts[1]], [params] * 4)
        assert [len(output.outputs[0].token_ids) for output in ordered[:3]] == [12] * 3
    assert llm.engine.step() == StepResult()
    assert_pool_is_full(llm)


def test_all_are_aborted_while_their_next_step_is_queued(place: Place, engine_dir: Path) -> None:
    llm = place.load(engine_dir)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    llm.engine.add_request("a", llm.processor.process({"prompt_token_ids": [1, 2]}), params)
    for _ in range(3):
        llm.engine.step()
    llm.engine.abort("a")
    assert_pool_is_full(llm)
    llm.engine.add_request("a", llm.processor.process({"prompt_token_ids": [1, 3]}), params)
    outputs = [output for _ in range(12) for output in llm.engine.step().finished]
    assert len(outputs) == 1, "a step was computed for a request that no caller waits for"
    assert len(outputs[0].outputs[0].token_ids) == 12
    if place.device is not None:
        assert_as_alone(outputs, engine_dir, [{"prompt_token_ids": [1, 3]}], [params])


@dataclasses.dataclass(frozen=True)
class LoggedReadback:
    """Records when the host waits."""

    reading: HostReadback
    log: list[str]

    def wait(self) -> Array:
        self.log.append("wait")
        return self.reading.wait()


@pytest.fixture
def log(place: Place, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records queued steps and waits, in order. A test clears it after loading its engine."""
    if place.device is None:
        pytest.skip(GPU_PRESENT)
    events: list[str] = []
    read, run = place.device.read, DecodeGraph.run

    def logged_run(self: DecodeGraph, *arguments: Any) -> Any:
        events.append("decode")
        return run(self, *arguments)

    monkeypatch.setattr(place.device, "read", lambda tensor: LoggedReadback(read(tensor), events))
    monkeypatch.setattr(DecodeGraph, "run", logged_run)
    return events


def test_the_next_step_is_queued_before_the_host_waits(place: Place, engine_dir: Path, log: list[str]) -> None:
    llm = place.load(engine_dir)
    for number in range(2):
        params = SamplingParams(temperature=0, max_tokens=5 + number, ignore_eos=True)
        llm.engine.add_request(str(number), llm.processor.process({"prompt_token_ids": [1, 2 + number]}), params)
    llm.engine.step()
    log.clear()
    while llm.engine.num_unfinished:
        llm.engine.step()
    assert log == ["decode", *["decode", "wait"] * 4, "wait"], "five steps, the last with one sequence left"


def test_who_waits_for_a_place_gets_it_before_more_is_queued(place: Place, engine_dir: Path, log: list[str]) -> None:
    llm = place.load(engine_dir)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for number in range(2):
        llm.engine.add_request(str(number), llm.processor.process({"prompt_token_ids": [1, 2 + number]}), params)
    for _ in range(3):
        llm.engine.step()
    llm.engine.add_request("late", llm.processor.process({"prompt_token_ids": [1, 9]}), params)
    log.clear()
    llm.engine.step()
    assert log == ["wait"], "the step that had been queued, and no other"
    tokens = llm.engine.step().progress
    assert [progress.request_id for progress in tokens] == ["late"]


def test_a_step_that_cannot_be_queued_fails_after_the_one_before(
    place: Place, engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = place.load(engine_dir)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm.engine.add_request("a", llm.processor.process({"prompt_token_ids": [1, 2]}), params)
    llm.engine.step()
    run, calls = DecodeGraph.run, []

    def broken(self: DecodeGraph, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise ValueError("no such luck")
        return run(self, *arguments)

    monkeypatch.setattr(DecodeGraph, "run", broken)
    first = llm.engine.step()
    assert [len(progress.token_ids) for progress in first.progress] == [1] and not first.finished
    second = llm.engine.step()
    assert not second.progress and isinstance(second.finished[0].error, StepError)
    assert "the decode step failed: ValueError('no such luck')" in str(second.finished[0].error)
    assert len(second.finished[0].outputs[0].token_ids) == 2
    assert_pool_is_full(llm)
    assert len(llm.generate({"prompt_token_ids": [1, 2]}, params, use_tqdm=False)[0].outputs[0].token_ids) == 8
