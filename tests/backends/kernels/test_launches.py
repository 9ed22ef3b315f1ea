"""How many launches a prefill and a decode step take on a GPU, counted on the host that stands in for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.backends.kernels.backend import KernelBackend
from dpn_rt.backends.kernels.decode_graphs import DecodeGraphs
from tests.backends.kernels.launches import counted_launches
from tests.engine.models import MODEL, random_prompt, write_random_engine
from tests.places import HAS_GPU, Place
from tests.skips import GPU_PRESENT

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
NUM_STAGES = 4

pytestmark = pytest.mark.skipif(HAS_GPU, reason=GPU_PRESENT)


def engine_of(llm: LLM) -> KernelBackend:
    backend = llm.engine.runner.backend
    assert isinstance(backend, KernelBackend)
    return backend


def add(llm: LLM, count: int) -> None:
    generator = np.random.default_rng(torch.initial_seed())
    for number in range(count):
        prompt = random_prompt(generator, (16, 16)) | {"route": [2, None, 1]}
        llm.engine.add_request(str(number), llm.processor.process(prompt), PARAMS)


def test_nodes_of_a_decode_step(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine launches a layer, and for the whole step the embedding, the last norm, the head and the best ids."""
    step = engine_of(place.load(write_random_engine(tmp_path / "engine")))._step
    assert isinstance(step, DecodeGraphs)
    with torch.inference_mode(), counted_launches(monkeypatch) as launches:
        step._graphs[4]._step()
    layers = MODEL.decoder.num_layers
    counts = dict(launches.counts)
    for name in ("rope_store", "attention_decode", "silu_mul"):
        assert counts.pop(name) == layers
    products = sum(counts.pop(name, 0) for name in ("product", "mm", "linear", "addmm"))
    assert products == 4 * layers + 1
    assert counts.pop("rms_norm") == 1 and counts.pop("add_rms_norm") == 2 * layers, "stages are joined"
    # New entries of block tables, the slots' tables, the embedding, cache rows of all stages.
    assert counts.pop("index_copy_") == 1 and counts.pop("index_select") == 2 and counts.pop("sub") == 1
    assert sum(counts.values()) <= 8, f"best ids, and where logits are not finite: {counts}"


@pytest.mark.parametrize("count", [1, 3])
def test_launches_of_a_prefill(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    llm = place.load(write_random_engine(tmp_path / "engine"), max_num_seqs=4, max_graph_rows=1024)
    add(llm, count)
    with counted_launches(monkeypatch) as launches:
        llm.engine.step()
    counts = dict(launches.counts)
    # Rows go into the graph's memory, those of the last stage come out as new ones. The rest places the metadata.
    assert counts.pop("graph") == NUM_STAGES
    assert counts.pop("copy_") == 2 * NUM_STAGES - 1 + 2 * NUM_STAGES and counts.pop("clone") == 1
    assert counts.pop("_foreach_copy_") == 2 * NUM_STAGES and counts.pop("zero_") == NUM_STAGES
    boundaries = {"route": 2, "advance_layout": 2, "pool": 1, "add": 1, "sub": 2, "to": 1}
    for name, number in boundaries.items():
        assert counts.pop(name) == number * (NUM_STAGES - 1), name
    assert sum(counts.values()) <= 16, f"the embedding, the head, and the first token: {counts}"


def test_graphs_take_fewer_launches(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = write_random_engine(tmp_path / "engine")
    totals = []
    for rows in (0, 320):
        llm = place.load(engine, max_graph_rows=rows)
        add(llm, 1)
        with counted_launches(monkeypatch) as launches:
            llm.engine.step()
        totals.append(launches.total)
    assert totals[1] < totals[0]
