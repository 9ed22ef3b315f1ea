"""Every block and slot of the KV pool is freed, for any mix of requests that end in any way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpn_rt import LLM, SamplingParams
from dpn_rt.cache.block_allocator import BlockAllocator
from dpn_rt.engine.prefill import Prefill
from dpn_rt.errors import DpnError
from tests.engine.models import kv_bytes, random_prompt, write_random_engine

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 12), st.integers(0, 12), st.integers(1, 20), st.integers(1, 3)),
        st.tuples(st.just("step"), st.integers(1, 5)),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("fail")),
    ),
    min_size=3,
    max_size=30,
)


@pytest.fixture(
    scope="module",
    params=[(None, 0), (7, 0), (None, 2**14), (7, 2**20)],
    ids=["whole", "chunked", "whole, reused", "chunked, reused"],
)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    engine = write_random_engine(tmp_path_factory.mktemp("engines") / "adaptive")
    return LLM(
        engine,
        kv_cache_bytes=kv_bytes(200, 4),
        block_size=4,
        max_num_seqs=5,
        max_num_batched_tokens=200,
        max_chunk_tokens=request.param[0],
        reuse_bytes=request.param[1],
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS, seed=st.integers(0, 2**32 - 1))
def test_pool_is_full_again(llm: LLM, monkeypatch: pytest.MonkeyPatch, actions: list[Any], seed: int) -> None:
    generator = np.random.default_rng(seed)
    engine, runner = llm.engine, llm.engine.runner
    names: list[str] = []
    ended: set[str] = set()
    pictures = [random_prompt(generator, grid) for grid in ((3, 3), (7, 5))]  # asked about again and again

    def failing(*_: Any) -> Any:
        raise MemoryError("no memory for this step")

    for action in actions:
        if action[0] == "add":
            _, height, width, max_tokens, n = action
            grid = (height, width) if height * width else None
            names.append(str(len(names)))
            params = SamplingParams(n=n, seed=seed, max_tokens=max_tokens, ignore_eos=bool(max_tokens % 2))
            prompt = pictures[height % 2] if width % 3 == 0 else random_prompt(generator, grid)
            engine.add_request(names[-1], llm.processor.process(prompt), params)
        elif action[0] == "step":
            for _ in range(action[1]):
                ended |= {output.request_id for output in engine.step().finished}
        elif action[0] == "abort" and names:
            output = engine.abort(names[action[1] % len(names)])
            ended |= set() if output is None else {output.request_id}
        elif action[0] == "fail":
            with monkeypatch.context() as patch:
                patch.setattr(runner, "decode", failing)
                patch.setattr(Prefill, "advance", failing)
                failed = engine.step().finished
            assert all(isinstance(output.error, DpnError) for output in failed)
            ended |= {output.request_id for output in failed}
    while engine.num_unfinished:
        ended |= {output.request_id for output in engine.step().finished}
    assert ended == set(names)
    if runner.prefix_cache is not None:
        runner.prefix_cache.clear()
    cache = runner.cache
    assert isinstance(cache, BlockAllocator)
    assert (cache._num_users == 0).all()
    assert cache.num_free_blocks == cache.num_blocks
    assert cache.num_free_slots == cache.config.max_num_seqs
    assert sorted(cache._unused_blocks.tolist()) == list(range(cache.num_blocks))
