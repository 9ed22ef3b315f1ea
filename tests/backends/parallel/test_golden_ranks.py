"""Two ranks give the published codes' own numbers: routes, kept rows, KV lengths, logits, greedy ids."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

import pytest

from dpn_rt import LLM
from dpn_rt.format.engine_dir import EngineSource, weight_spec, write_engine
from tests import reducer_cases, test_golden_reducers, test_golden_runtime
from tests.golden_answers import PARAMS
from tests.golden_cases import CASES, GoldenCase
from tests.reducer_cases import ReducerCase

pytestmark = pytest.mark.usefixtures("ranks_in_threads")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_routers(case: GoldenCase, tmp_path: Path) -> None:
    weights = case.canonical_weights()
    ordered = [(name, weights[name]) for name in weight_spec(case.config)]
    write_engine(tmp_path / "engine", case.config, EngineSource("0" * 64, "original"), ordered)
    with closing(LLM(tmp_path / "engine", tensor_parallel_size=2)) as llm:
        output = llm.generate(case.request(), PARAMS, use_tqdm=False)[0]
    test_golden_runtime.assert_gives(output, test_golden_runtime.of_golden(case), case.name)


@pytest.mark.parametrize("case", reducer_cases.CASES, ids=lambda case: case.name)
def test_reducers(case: ReducerCase, tmp_path: Path) -> None:
    prompt = case.prompt(**test_golden_reducers.forced(case))
    with closing(test_golden_reducers.load(case, tmp_path / "engine", tensor_parallel_size=2)) as llm:
        output = llm.generate(prompt, PARAMS, use_tqdm=False)[0]
    test_golden_reducers.assert_as_published(output, case)


@pytest.mark.parametrize("name", ["fv06_g12_k2_r50_first", "pd07_g12_l36_odd"])
def test_reducers_in_chunks_while_another_decodes(name: str, tmp_path: Path) -> None:
    """In most chunks no sequence ends, so no query of them attends."""
    case = next(case for case in reducer_cases.CASES if case.name == name)
    options = {"max_chunk_tokens": 7, "tensor_parallel_size": 2}
    text = {"prompt_token_ids": [1, 7, 8]}
    with closing(test_golden_reducers.load(case, tmp_path / "engine", **options)) as llm:
        engine, process = llm.engine, llm.processor.process
        engine.add_request("text", process(text), dataclasses.replace(PARAMS, max_tokens=40, ignore_eos=True))
        engine.step()
        engine.add_request("case", process(case.prompt()), PARAMS)
        num_idle, finished = 0, []
        while not finished:
            result = engine.step()
            num_idle += not result.progress
            finished = [output for output in result.finished if output.request_id == "case"]
        assert num_idle > 1, "the prefill was cut"
    test_golden_reducers.assert_as_published(finished[0], case)


@pytest.mark.parametrize("name", ["fv01_g24_k2_r50", "pd07_g12_l36_odd"])
def test_reducers_with_cached_prefixes(name: str, tmp_path: Path) -> None:
    """Keys of a cached prefix are read by each rank from its own blocks."""
    case = next(case for case in reducer_cases.CASES if case.name == name)
    options = {"reuse_bytes": 2**24, "tensor_parallel_size": 2}
    with closing(test_golden_reducers.load(case, tmp_path / "engine", **options)) as llm:
        outputs = [llm.generate(case.prompt(), PARAMS, use_tqdm=False)[0] for _ in range(2)]
    for output in outputs:
        test_golden_reducers.assert_as_published(output, case)
    assert outputs[1].num_cached_tokens > 0


def test_preempted(tmp_path: Path) -> None:
    """Of two, the later one gives its rows back on both ranks, and keeps the same ones when it runs again."""
    case = next(case for case in reducer_cases.CASES if case.name == "fv06_g12_k2_r50_first")
    decoder, decoded = case.config.decoder, 3
    rows = 2 * (sum(case.arrays["cache_len_prefill"].tolist()) + decoded * decoder.num_layers)
    row_bytes = 2 * 4 * decoder.num_kv_heads * decoder.head_dim
    options = {"block_size": 1, "kv_cache_bytes": rows * row_bytes // 2, "tensor_parallel_size": 2}
    with closing(test_golden_reducers.load(case, tmp_path / "engine", **options)) as llm:
        outputs = llm.generate([case.prompt()] * 2, PARAMS, use_tqdm=False)
        assert llm.engine.num_preemptions > 0
    for output in outputs:
        test_golden_reducers.assert_as_published(output, case)
