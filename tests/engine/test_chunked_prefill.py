"""A prefill in parts gives the same result as a whole one, and running requests go on between the parts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.cache.block_allocator import BlockAllocator
from dpn_rt.outputs import RequestOutput
from tests.engine.answers import GREEDY, assert_pool_is_full, assert_same
from tests.engine.models import GRIDS, kv_bytes, random_prompt, write_random_engine

LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_engine(tmp_path_factory.mktemp("engines") / "adaptive")


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, Any]]:
    generator = np.random.default_rng(torch.initial_seed())
    return [random_prompt(generator, grid) for grid in GRIDS]


@pytest.fixture(scope="module")
def alone(engine_dir: Path, prompts: list[dict[str, Any]]) -> list[RequestOutput]:
    llm = LLM(engine_dir)
    return [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]


def run(llm: LLM, outputs: dict[str, RequestOutput]) -> list[str]:
    """Runs steps to the end; returns the kind of each."""
    kinds = []
    schedule = llm.engine._scheduler.schedule
    batches = []
    llm.engine._scheduler.schedule = lambda: batches.append(schedule()) or batches[-1]  # type: ignore[method-assign]
    while llm.engine.num_unfinished:
        outputs.update({output.request_id: output for output in llm.engine.step().finished})
        kinds.append("none" if batches[-1] is None else batches[-1].kind)
    return kinds


@pytest.mark.parametrize("chunk", [1, 7, 16, 100, 10_000])
def test_parts_give_what_the_whole_gives(
    engine_dir: Path, prompts: list[dict[str, Any]], alone: list[RequestOutput], chunk: int
) -> None:
    chosen = range(len(prompts)) if chunk > 1 else range(0, len(prompts), 3)
    llm = LLM(engine_dir, max_chunk_tokens=chunk, max_num_seqs=4)
    llm.engine.add_request("long", llm.processor.process({"prompt_token_ids": [1, 2, 3]}), LONG)
    llm.engine.step()
    for i in chosen:
        llm.engine.add_request(str(i), llm.processor.process(prompts[i]), GREEDY)
    outputs: dict[str, RequestOutput] = {}
    run(llm, outputs)
    for i in chosen:
        assert_same(outputs[str(i)], alone[i])
    assert_pool_is_full(llm)


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["never", "at random"])
@pytest.mark.parametrize("chunk", [20, 10_000])
def test_stages_that_could_not_be_prepared(
    engine_dir: Path,
    prompts: list[dict[str, Any]],
    alone: list[RequestOutput],
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    chunk: int,
) -> None:
    monkeypatch.setattr(BlockAllocator, "has_unused_for", lambda *_: random.random() < share)
    llm = LLM(engine_dir, max_num_seqs=4, max_chunk_tokens=chunk)
    for output, expected in zip(llm.generate(prompts, GREEDY, use_tqdm=False), alone, strict=True):
        assert_same(output, expected)
    assert_pool_is_full(llm)


def test_running_requests_decode_between_parts(engine_dir: Path, prompts: list[dict[str, Any]]) -> None:
    llm = LLM(engine_dir, max_chunk_tokens=20)
    llm.engine.add_request("long", llm.processor.process({"prompt_token_ids": [1, 2, 3]}), LONG)
    llm.engine.step()
    for i, prompt in enumerate(prompts[:4]):
        llm.engine.add_request(str(i), llm.processor.process(prompt), GREEDY)
    kinds = "".join(kind[0] for kind in run(llm, {}))
    assert kinds.count("p") > 5, "one part would show nothing"
    assert "pp" not in kinds


def test_requests_that_leave_in_the_middle_do_not_affect_others(
    engine_dir: Path, prompts: list[dict[str, Any]], alone: list[RequestOutput]
) -> None:
    for steps in range(1, 40, 3):
        llm = LLM(engine_dir, max_chunk_tokens=13)
        llm.engine.add_request("long", llm.processor.process({"prompt_token_ids": [1, 2, 3]}), LONG)
        llm.engine.step()
        for i in range(5):
            llm.engine.add_request(str(i), llm.processor.process(prompts[i]), GREEDY)
        for _ in range(steps):
            llm.engine.step()
        used = llm.engine.runner.cache.bytes_in_use
        leaving = random.randrange(5)
        llm.engine.abort(str(leaving))
        assert llm.engine.runner.cache.bytes_in_use <= used
        outputs: dict[str, RequestOutput] = {}
        run(llm, outputs)
        for i in range(5):
            if i != leaving:
                assert_same(outputs[str(i)], alone[i])
        assert_pool_is_full(llm)


def test_all_leave_in_the_middle(engine_dir: Path, prompts: list[dict[str, Any]]) -> None:
    llm = LLM(engine_dir, max_chunk_tokens=5)
    for name, prompt in (("long", {"prompt_token_ids": [1, 2, 3]}), ("a", prompts[0]), ("b", prompts[1])):
        llm.engine.add_request(name, llm.processor.process(prompt), LONG)
        llm.engine.step()
    for name in ("a", "b", "long"):
        assert llm.engine.abort(name) is not None
    assert llm.engine.step().progress == []
    assert_pool_is_full(llm)


def test_decoding_never_takes_blocks_that_a_prefill_needs(
    engine_dir: Path, prompts: list[dict[str, Any]], alone: list[RequestOutput]
) -> None:
    num_bytes = kv_bytes(256 + 25 + 23, 4)
    llm = LLM(engine_dir, kv_cache_bytes=num_bytes, block_size=4, max_chunk_tokens=9)
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    for output, expected in zip(outputs, alone, strict=True):
        assert_same(output, expected)
    assert llm.engine.num_preemptions > 0
    assert_pool_is_full(llm)
