"""Never a wrong image: `benchmarks/identity.py`, briefly, with caches that forget and sequences that are preempted."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from benchmarks.identity import KV_CACHE_BYTES, TILED_KV_CACHE_BYTES, TILED_SCALE, ask_all, cases
from benchmarks.models.tiled_checkpoint import Family, write_tiled_checkpoint
from dpn_rt import LLM
from dpn_rt.builders.native import build_engine
from dpn_rt.settings import EngineOptions
from tests.server.conftest import MODEL, RunningServer, StartServer, run_server
from tests.server.test_lifecycle import metrics
from tests.server.test_reduce import SPECS, dense_dir

_ = dense_dir
TIGHT = EngineOptions(max_num_seqs=8, max_chunk_tokens=64, reuse_bytes=2_000_000, kv_cache_bytes=KV_CACHE_BYTES)


def check(server: RunningServer, llm: LLM, variants: list[dict[str, object]], requests: int, scale: int = 1) -> None:
    given = cases(llm, MODEL, variants, per_image=1, scale=scale)
    outcome = ask_all(server.url, llm, given, clients=12, requests=requests, seed=5)
    assert not outcome.wrong, outcome.wrong[:3]
    assert outcome.right + outcome.left == requests and outcome.left
    server.wait_until_idle()
    seen = metrics(server)
    assert seen["dpn_rt:num_preemptions_total"] > 0
    assert seen["dpn_rt:image_cache_hits_total"] + seen["dpn_rt:prefix_cache_hits_total"] > 0


def test_every_answer_is_the_answer_alone(start_server: StartServer, llm: LLM) -> None:
    server = start_server(TIGHT, processed_image_bytes=2_000_000)
    routes = [{"route": [2, 2, 2]}, {"route": [0, 1, 2]}, {"route": [2, None, 0]}, {"router_bias": 4.0}]
    check(server, llm, list(routes), requests=50)


def test_every_reduced_answer_is_the_answer_alone(dense_dir: Path) -> None:
    options = EngineOptions(**{**vars(TIGHT), "reduce": SPECS})
    server = run_server(dense_dir, options, reduce=SPECS, processed_image_bytes=2_000_000)
    try:
        check(server, LLM(dense_dir, reduce=SPECS), [{"reduce": spec} for spec in SPECS], requests=50)
    finally:
        server.stop()


@pytest.mark.parametrize("family", get_args(Family))
def test_every_answer_about_tiles_is_the_answer_alone(family: Family, tmp_path: Path) -> None:
    write_tiled_checkpoint(tmp_path / "checkpoint", family)
    engine = build_engine(tmp_path / "checkpoint", tmp_path / "engine", dtype="float32").path
    options = EngineOptions(**{**vars(TIGHT), "kv_cache_bytes": TILED_KV_CACHE_BYTES, "reduce": SPECS})
    server = run_server(engine, options, reduce=SPECS, processed_image_bytes=2_000_000)
    try:
        llm = LLM(engine, reduce=SPECS)
        check(server, llm, [{"reduce": spec} for spec in SPECS], requests=50, scale=TILED_SCALE)
    finally:
        server.stop()
