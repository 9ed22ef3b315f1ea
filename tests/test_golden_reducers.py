"""Training-free reducers against the published codes' own numbers: kept rows, KV lengths, logits, greedy ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.format.engine_dir import EngineSource, write_engine
from dpn_rt.format.weight_spec import weight_spec
from dpn_rt.outputs import RequestOutput
from tests.reducer_cases import CASES, ReducerCase

PARAMS = SamplingParams(max_tokens=7, temperature=0.0, logprobs=-1, ignore_eos=True)
TOLERANCE = 1e-4

golden = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def load(case: ReducerCase, path: Path, *specs: str, **options: Any) -> LLM:
    """An engine of the case's stock model, with these reductions."""
    if not path.exists():
        weights = case.canonical_weights()
        ordered = [(name, weights[name]) for name in weight_spec(case.config)]
        write_engine(path, case.config, lambda: EngineSource("0" * 64, "original"), ordered, {})
    return LLM(path, reduce=list(specs) or case.spec, **options)


def forced(case: ReducerCase) -> dict[str, Any]:
    """Rows that are given beforehand: those that the published code drew by a generator of its own."""
    return {"kept": case.kept} if case.meta["method"]["name"] == "random" else {}


def assert_as_published(output: RequestOutput, case: ReducerCase) -> None:
    """All numbers of a request's first boundaries and of seven tokens."""
    completion, pyramid = output.outputs[0], output.pyramid
    wanted = case.kept or [None] * len(pyramid.kept)
    assert pyramid.kept == wanted
    assert list(completion.token_ids) == case.generated_ids
    actual = torch.tensor(
        [[position[token].logprob for token in range(case.meta["vocab"])] for position in completion.logprobs or ()],
        dtype=torch.float64,
    )
    torch.testing.assert_close(actual, case.logprobs, atol=TOLERANCE, rtol=0)


@golden
def test_generate_equals_the_published_code(case: ReducerCase, tmp_path: Path) -> None:
    llm = load(case, tmp_path / "engine")
    output = llm.generate(case.prompt(**forced(case)), PARAMS, use_tqdm=False)[0]
    assert_as_published(output, case)
    lengths = case.arrays["cache_len_prefill"].tolist()
    stages = llm.model.stage_layers
    assert output.pyramid.kv_lengths == [lengths[layers.start] for layers in stages]
    assert [lengths[layers.stop - 1] for layers in stages] == output.pyramid.kv_lengths


@golden
@pytest.mark.parametrize("options", [{"max_chunk_tokens": 7}, {"reuse_bytes": 2**24}], ids=["chunked", "reuse"])
def test_chunked_and_with_cached_prefixes(case: ReducerCase, tmp_path: Path, options: dict[str, Any]) -> None:
    llm = load(case, tmp_path / "engine", **options)
    for _ in range(3):
        assert_as_published(llm.generate(case.prompt(**forced(case)), PARAMS, use_tqdm=False)[0], case)
