"""A request gets the same result in a batch as alone: in any order, preempted, or admitted late."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.engine.prefill import Prefill
from dpn_rt.engine.scheduler import Batch
from dpn_rt.outputs import RequestOutput
from tests.engine.answers import GREEDY, assert_pool_is_full, assert_same
from tests.engine.models import GRIDS, MODEL, kv_bytes, random_prompt, write_random_engine


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_engine(tmp_path_factory.mktemp("engines") / "adaptive")


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, Any]]:
    generator = np.random.default_rng(torch.initial_seed())
    made = [random_prompt(generator, grid) for grid in GRIDS]
    made[1]["route"] = [0, 1, None]
    made[4]["route"] = [2, 0, 1]
    made[7]["route"] = [None, 2, None]
    return made


@pytest.fixture(scope="module")
def alone(engine_dir: Path, prompts: list[dict[str, Any]]) -> list[RequestOutput]:
    llm = LLM(engine_dir)
    return [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]


def test_routes_differ(alone: list[RequestOutput]) -> None:
    """Routes differ between prompts; otherwise the other tests would show little."""
    assert len({tuple(output.pyramid.experts) for output in alone}) >= 4


def test_batch_equals_alone_in_any_order(
    engine_dir: Path, prompts: list[dict[str, Any]], alone: list[RequestOutput]
) -> None:
    llm = LLM(engine_dir)
    order = list(range(len(prompts)))
    for _ in range(3):
        random.shuffle(order)
        outputs = llm.generate([prompts[i] for i in order], GREEDY, use_tqdm=False)
        for position, output in zip(order, outputs, strict=True):
            assert_same(output, alone[position])
    assert_pool_is_full(llm)


def test_small_budgets_admit_late(engine_dir: Path, prompts: list[dict[str, Any]], alone: list[RequestOutput]) -> None:
    llm = LLM(engine_dir, max_num_seqs=3, max_num_batched_tokens=64)
    for output, expected in zip(llm.generate(prompts, GREEDY, use_tqdm=False), alone, strict=True):
        assert_same(output, expected)
    assert_pool_is_full(llm)


def test_preempted_equals_alone(engine_dir: Path, prompts: list[dict[str, Any]], alone: list[RequestOutput]) -> None:
    # Just enough room for the longest prompt that can be drawn (256 visual, 11 + 11 + 3 text rows) and its answer.
    num_bytes = kv_bytes(256 + 25 + 23, 4)
    llm = LLM(engine_dir, kv_cache_bytes=num_bytes, block_size=4)
    # Nine times 32 rows nearly fill the pool, and every sequence needs a new block for its next row.
    crowd = [{"prompt_token_ids": [*range(start, start + 32)]} for start in range(3, 12)]
    crowd_alone = [LLM(engine_dir).generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in crowd]
    outputs = llm.generate([*crowd, *prompts], GREEDY, use_tqdm=False)
    for output, expected in zip(outputs, [*crowd_alone, *alone], strict=True):
        assert_same(output, expected)
    assert llm.engine.num_preemptions > 0
    assert_pool_is_full(llm)


def test_lower_priority_numbers_go_first(engine_dir: Path, prompts: list[dict[str, Any]]) -> None:
    llm = LLM(engine_dir, max_num_seqs=1)
    for name, priority in (("first", 0), ("late", 5), ("second", 0), ("urgent", -1)):
        llm.engine.add_request(name, llm.processor.process(prompts[0]), GREEDY, priority=priority)
    finished: list[str] = []
    while llm.engine.num_unfinished:
        finished += [output.request_id for output in llm.engine.step().finished]
    assert finished == ["urgent", "first", "second", "late"]


def test_the_last_priority_is_preempted_first(engine_dir: Path) -> None:
    prompt = {"prompt_token_ids": list(range(3, 23))}
    # Three prompts of 20 rows fit, but not with 20 more tokens each.
    num_bytes = kv_bytes(3 * 24, 4)
    llm = LLM(engine_dir, kv_cache_bytes=num_bytes, block_size=4)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for name, priority in (("background", 1), ("first", 0), ("second", 0)):
        llm.engine.add_request(name, llm.processor.process(prompt), params, priority=priority)
    preemptions = {name: request.sequences[0] for name, request in llm.engine._requests.items()}
    finished: list[str] = []
    while llm.engine.num_unfinished:
        finished += [output.request_id for output in llm.engine.step().finished]
    assert finished == ["first", "second", "background"]
    assert preemptions["background"].num_preemptions > 0 and preemptions["first"].num_preemptions == 0
    assert_pool_is_full(llm)


def test_seeded_sampling_does_not_depend_on_the_batch(engine_dir: Path, prompts: list[dict[str, Any]]) -> None:
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=12, ignore_eos=True) for i in range(len(prompts))]
    llm = LLM(engine_dir)
    together = llm.generate(prompts, params, use_tqdm=False)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        assert llm.generate(prompt, one, use_tqdm=False)[0].outputs[0].token_ids == output.outputs[0].token_ids


def test_several_completions(engine_dir: Path, prompts: list[dict[str, Any]]) -> None:
    llm = LLM(engine_dir)
    params = SamplingParams(n=4, temperature=1.5, seed=3, max_tokens=8, ignore_eos=True)
    output = llm.generate(prompts[0], params, use_tqdm=False)[0]
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) > 1
    assert_pool_is_full(llm)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_completions_share_one_prefill(
    engine_dir: Path, prompts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, block_size: int
) -> None:
    prefilled: list[int] = []
    begin = Prefill.__init__

    def counted(prefill: Prefill, batch: Batch, *parts: Any) -> None:
        prefilled.append(len(batch.sequences))
        begin(prefill, batch, *parts)

    monkeypatch.setattr(Prefill, "__init__", counted)
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=40, ignore_eos=True, logprobs=0)
    llm = LLM(engine_dir, block_size=block_size)
    together = llm.generate(prompts[:4], params, use_tqdm=False)
    assert sum(prefilled) == 4
    assert_pool_is_full(llm)
    prefilled.clear()
    # One sequence at a time: there is no room to fork, and every completion is prefilled by itself.
    apart = LLM(engine_dir, block_size=block_size, max_num_seqs=1).generate(prompts[:4], params, use_tqdm=False)
    assert sum(prefilled) == 12
    for output, other in zip(together, apart, strict=True):
        assert output.pyramid.experts == other.pyramid.experts
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in other.outputs]
        for completion, other_completion in zip(output.outputs, other.outputs, strict=True):
            assert completion.cumulative_logprob == pytest.approx(other_completion.cumulative_logprob, abs=1e-3)


def test_completions_share_full_blocks(engine_dir: Path) -> None:
    llm = LLM(engine_dir, block_size=4)
    cache = llm.engine.runner.cache
    prompt = llm.processor.process({"prompt_token_ids": list(range(3, 25))})  # 22 rows: 5 full blocks and a half
    llm.engine.add_request("one", prompt, SamplingParams(n=5, max_tokens=8, ignore_eos=True))
    llm.engine.step()
    assert cache.num_blocks - cache.num_free_blocks == sum(cache.config.layer_groups) * (5 + 5)
    llm.engine.abort("one")
    assert_pool_is_full(llm)


def test_stream_gives_what_generate_gives(
    engine_dir: Path, prompts: list[dict[str, Any]], alone: list[RequestOutput]
) -> None:
    llm = LLM(engine_dir)
    ids: list[int] = []
    for delta in llm.stream(prompts[0], GREEDY):
        ids += delta.token_ids
        last = delta
    assert ids == alone[0].outputs[0].token_ids
    assert last.finish_reason == "length"
    assert last.output is not None
    assert_same(last.output, alone[0])
    abandoned = llm.stream(prompts[0], GREEDY)
    next(abandoned)
    abandoned.close()
    assert_pool_is_full(llm)


def test_decode_launches_do_not_grow_with_the_batch(
    engine_dir: Path, prompts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpn_rt import ops

    counts: list[int] = []
    calls = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return call

    for name in ("rms_norm", "add_rms_norm", "linear", "rope_store", "attention_decode", "silu_mul"):
        monkeypatch.setattr(ops, name, counted(getattr(ops, name)))
    llm = LLM(engine_dir)
    for number in (1, 8):
        for index in range(number):
            llm.engine.add_request(f"{number}-{index}", llm.processor.process(prompts[index]), GREEDY)
        llm.engine.step()
        calls = 0
        llm.engine.step()
        counts.append(calls)
        for index in range(number):
            llm.engine.abort(f"{number}-{index}")
    assert counts[0] == counts[1] > MODEL.decoder.num_layers


def test_streams_and_generate_take_turns(
    engine_dir: Path, prompts: list[dict[str, Any]], alone: list[RequestOutput]
) -> None:
    """A step of one caller computes the requests of all callers, and each caller must get its own results."""
    llm = LLM(engine_dir)
    streams = [llm.stream(prompt, GREEDY) for prompt in prompts[:3]]
    deltas = [[next(stream)] for stream in streams]
    assert_same(llm.generate(prompts[3], GREEDY, use_tqdm=False)[0], alone[3])
    for own, stream in zip(deltas, streams, strict=True):
        own += list(stream)
    for own, expected in zip(deltas, alone[:3], strict=True):
        assert [token_id for delta in own for token_id in delta.token_ids] == expected.outputs[0].token_ids
        assert [delta.output is not None for delta in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].output is not None
        assert_same(own[-1].output, expected)
    assert_pool_is_full(llm)
