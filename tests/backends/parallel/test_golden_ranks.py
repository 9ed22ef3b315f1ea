"""Two ranks give the published codes' own numbers: routes, kept rows, KV lengths, logits, greedy ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import reducer_cases, test_golden_reducers, test_golden_runtime
from tests.golden_cases import CASES, GoldenCase
from tests.reducer_cases import ReducerCase
from tests.test_golden_runtime import PARAMS

pytestmark = pytest.mark.usefixtures("ranks_in_threads")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_routers(case: GoldenCase, tmp_path: Path) -> None:
    llm = test_golden_runtime.load(case, tmp_path, tensor_parallel_size=2)
    output = llm.generate(case.request(), PARAMS, use_tqdm=False)[0]
    llm.close()
    test_golden_runtime.assert_gives(output, test_golden_runtime.of_golden(case), case.name)


@pytest.mark.parametrize("case", reducer_cases.CASES, ids=lambda case: case.name)
def test_reducers(case: ReducerCase, tmp_path: Path) -> None:
    llm = test_golden_reducers.load(case, tmp_path / "engine", tensor_parallel_size=2)
    prompt = case.prompt(**test_golden_reducers.forced(case))
    output = llm.generate(prompt, PARAMS, use_tqdm=False)[0]
    llm.close()
    test_golden_reducers.assert_as_published(output, case)


@pytest.mark.parametrize("name", ["fv01_g24_k2_r50", "pd07_g12_l36_odd"])
def test_reducers_in_chunks_with_cached_prefixes(name: str, tmp_path: Path) -> None:
    """Keys of a cached prefix are read by each rank from its own blocks."""
    case = next(case for case in reducer_cases.CASES if case.name == name)
    options = {"max_chunk_tokens": 7, "reuse_bytes": 2**24, "tensor_parallel_size": 2}
    llm = test_golden_reducers.load(case, tmp_path / "engine", **options)
    outputs = [llm.generate(case.prompt(), PARAMS, use_tqdm=False)[0] for _ in range(2)]
    llm.close()
    for output in outputs:
        test_golden_reducers.assert_as_published(output, case)
    assert outputs[1].num_cached_tokens > 0
