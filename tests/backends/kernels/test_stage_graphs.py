"""Stages that are recorded give the rows that they give kernel by kernel, in any bucket."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpn_rt import LLM, SamplingParams
from dpn_rt.backends.kernels.backend import KernelBackend
from dpn_rt.backends.kernels.stage_graphs import (
    MOST_PADDING,
    WEIGHT_BOUND_ROWS,
    StageGraphs,
    row_buckets,
    seq_buckets,
)
from dpn_rt.backends.kernels.stages import PlainStages
from dpn_rt.device.host import RepeatedStep
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.model.stage_batch import StageBatch
from tests.engine.answers import all_logprobs
from tests.engine.models import MODEL, random_prompt, with_decoder, write_random_engine
from tests.places import Place
from tests.skips import GPU_PRESENT

PARAMS = SamplingParams(temperature=0, max_tokens=3, logprobs=-1, ignore_eos=True)
GRIDS = [(12, 12), (4, 4), None, (5, 5), (8, 8), (10, 6)]


@given(max_rows=st.integers(1, 5000))
def test_row_buckets(max_rows: int) -> None:
    buckets = list(row_buckets(max_rows))
    assert buckets == sorted(set(buckets)) and buckets[-1] == max_rows
    for smaller, size in itertools.pairwise(buckets):
        assert size <= WEIGHT_BOUND_ROWS or size <= MOST_PADDING * (smaller + 1)
        assert size >= smaller + 8 or size == max_rows, "buckets that are nearly the same"


def test_no_row_buckets() -> None:
    assert list(row_buckets(0)) == []
    assert list(row_buckets(200)) == [16, 32, 64, 128, 160, 192, 200]
    assert len(list(row_buckets(2048))) == 20


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(1, [1]), (2, [1, 2]), (4, [1, 4]), (6, [1, 4, 6]), (64, [1, 4, 16, 64]), (65, [1, 4, 16, 64, 65])],
)
def test_seq_buckets(limit: int, sizes: list[int]) -> None:
    assert list(seq_buckets(limit)) == sizes


def stages_of(llm: LLM) -> StageGraphs | PlainStages:
    backend = llm.engine.runner.backend
    assert isinstance(backend, KernelBackend)
    stages = backend.stages
    assert isinstance(stages, StageGraphs | PlainStages)
    return stages


@pytest.fixture
def prompts() -> list[dict[str, Any]]:
    generator = np.random.default_rng(torch.initial_seed())
    made = [random_prompt(generator, grid) for grid in GRIDS]
    return random.sample(made, len(made))


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[RepeatedStep]:
    """The graphs that are replayed, one after another."""
    graphs: list[RepeatedStep] = []
    original = RepeatedStep.replay
    monkeypatch.setattr(RepeatedStep, "replay", lambda graph: graphs.append(graph) or original(graph))
    return graphs


OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_chunk_tokens": 13},
    {"max_chunk_tokens": 40, "reuse_bytes": 2**24, "block_size": 4},
    {"max_num_seqs": 1},
    {"max_graph_rows": 40, "max_num_seqs": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_graphs_give_what_kernels_give(
    place: Place, tmp_path: Path, prompts: list[dict[str, Any]], options: dict[str, Any], replayed: list[RepeatedStep]
) -> None:
    if place.device is None:
        pytest.skip(GPU_PRESENT)
    engine = write_random_engine(tmp_path / "engine")
    plain = place.load(engine, **{**options, "max_graph_rows": 0})
    recorded = place.load(engine, **{"max_graph_rows": 1024, **options})
    assert isinstance(stages_of(plain), PlainStages)
    graphs = stages_of(recorded)
    assert isinstance(graphs, StageGraphs)
    for _ in range(2):  # the second time there may be a cached prefix
        expected = plain.generate(prompts, PARAMS, use_tqdm=False)
        replayed.clear()
        outputs = recorded.generate(prompts, PARAMS, use_tqdm=False)
        assert set(map(id, replayed)) & set(map(id, graphs._graphs.values())), "no stage was replayed"
        for output, other in zip(outputs, expected, strict=True):
            assert output.outputs[0].token_ids == other.outputs[0].token_ids
            assert output.pyramid.experts == other.pyramid.experts
            torch.testing.assert_close(all_logprobs(output), all_logprobs(other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "spec", ["fastv:k=2,ratio=0.5", "pyramiddrop:layers=2-4,ratios=0.6-0.3", "pool:kernel=2x2,layer=2"]
)
def test_stages_whose_queries_are_read(place: Place, tmp_path: Path, spec: str, replayed: list[RepeatedStep]) -> None:
    if place.device is None:
        pytest.skip(GPU_PRESENT)
    generator = np.random.default_rng(torch.initial_seed())
    engine = write_random_engine(tmp_path / "engine", dataclasses.replace(MODEL, reduction=NoReduction()))
    prompts = [random_prompt(generator, grid) for grid in [(8, 8), (4, 6), (12, 12)]]
    plain, recorded = (place.load(engine, reduce=spec, max_graph_rows=rows) for rows in (0, 1024))
    graphs = stages_of(recorded)
    assert isinstance(graphs, StageGraphs)
    expected = plain.generate(prompts, PARAMS, use_tqdm=False)
    replayed.clear()
    for output, other in zip(recorded.generate(prompts, PARAMS, use_tqdm=False), expected, strict=True):
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
        assert output.pyramid.kv_lengths == other.pyramid.kv_lengths
        torch.testing.assert_close(all_logprobs(output), all_logprobs(other), atol=1e-5, rtol=1e-5)
    assert set(map(id, replayed)) & set(map(id, graphs._graphs.values())), "no stage was replayed"


def test_rows_of_a_bucket_that_nobody_needs(place: Place, tmp_path: Path, prompts: list[dict[str, Any]]) -> None:
    """What is behind the rows of a batch may be anything, and is written to no block."""
    llm = place.load(write_random_engine(tmp_path / "engine", dataclasses.replace(MODEL, dtype=place.dtype)))
    graphs = stages_of(llm)
    assert isinstance(graphs, StageGraphs)
    expected = llm.generate(prompts[:3], PARAMS, use_tqdm=False)
    backend = llm.engine.runner.backend
    assert isinstance(backend, KernelBackend)
    backend.executor.pool.blocks.fill_(torch.nan)
    graphs._inputs.rows.fill_(torch.nan)
    for rows in (graphs._inputs.positions, graphs._inputs.cache_rows):
        rows.fill_(2**30)
    for output, other in zip(llm.generate(prompts[:3], PARAMS, use_tqdm=False), expected, strict=True):
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
        assert torch.equal(all_logprobs(output), all_logprobs(other))


def test_sequences_behind_the_last_have_no_context_of_an_earlier_batch(place: Place, tmp_path: Path) -> None:
    """Its blocks may be another sequence's by now, or none."""
    llm = place.load(write_random_engine(tmp_path / "engine", dataclasses.replace(MODEL, dtype=place.dtype)))
    graphs = stages_of(llm)
    assert isinstance(graphs, StageGraphs)
    where = graphs._inputs.rows.device
    for lengths in ([50, 3, 20], [7]):
        rows = torch.arange(len(lengths), dtype=torch.int32, device=where)
        batch = StageBatch(
            cu_seqlens=torch.arange(len(lengths) + 1, dtype=torch.int32, device=where),
            positions=rows,
            cache_rows=rows,
            context_lens=torch.tensor(lengths, dtype=torch.int32, device=where),
            block_tables=rows.new_full((1, len(lengths), 4), -1),
            last_rows=rows.long(),
        )
        graphs.place(1, batch)
        assert graphs._inputs.context_lens.tolist() == lengths + [1] * (6 - len(lengths))


def test_models_with_windows_have_no_graphs(place: Place, tmp_path: Path) -> None:
    windows = (None, 20, None, None, 20, None, None)
    model = with_decoder(dataclasses.replace(MODEL, dtype=place.dtype), windows=windows)
    assert isinstance(stages_of(place.load(write_random_engine(tmp_path / "engine", model))), PlainStages)
