"""The runtime for GPUs gives the published code's numbers; on a GPU within the error that bfloat16 has on the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.device.host import HostReadback
from dpn_rt.model.decoder import Stage
from dpn_rt.model.layout import Layout
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.outputs import RequestOutput
from tests.engine.models import MODEL, write_random_engine
from tests.golden_answers import PARAMS, assert_gives, of_golden
from tests.golden_cases import CASES, GoldenCase
from tests.places import HAS_GPU, CountingDevice, Place
from tests.skips import GPU_PRESENT

FIRST_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, ignore_eos=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_generate_equals_the_published_code(case: GoldenCase, place: Place, tmp_path: Path) -> None:
    build_engine(case.write_checkpoint(tmp_path / "checkpoint"), tmp_path / "engine", dtype=place.dtype)
    llm = place.load(tmp_path / "engine", max_num_seqs=2)
    if place.device is not None:
        assert_gives(llm.generate(case.request(), PARAMS, use_tqdm=False)[0], of_golden(case), case.name)
        return
    request = case.request() | {"route": case.experts}
    error = first_error(llm.generate(request, FIRST_TOKEN, use_tqdm=False)[0], case)
    on_cpu = LLM(tmp_path / "engine", device="cpu").generate(request, FIRST_TOKEN, use_tqdm=False)[0]
    assert error <= 2 * first_error(on_cpu, case) + 0.01


def first_error(output: RequestOutput, case: GoldenCase) -> float:
    """The largest difference between log-probabilities of the first token."""
    position = output.outputs[0].logprobs[0]  # type: ignore[index]
    actual = torch.tensor([float(position[token]) for token in range(len(position))], dtype=torch.float64)
    return float((actual - case.logprobs[0]).abs().max())


@pytest.mark.skipif(HAS_GPU, reason=GPU_PRESENT)  # watches the host's stand-in for a device
def test_a_stage_is_queued_as_soon_as_its_rows_are_known(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def told(cls: type, method: str) -> None:
        original = getattr(cls, method)
        monkeypatch.setattr(cls, method, lambda *args: events.append(method) or original(*args))

    for cls, method in ((HostReadback, "wait"), (Stage, "forward"), (Layout, "with_grids"), (CountingDevice, "upload")):
        told(cls, method)
    case = next(case for case in CASES if case.name == "c04_g24_r222")
    build_engine(case.write_checkpoint(tmp_path / "checkpoint"), tmp_path / "engine")
    llm = place.load(tmp_path / "engine", max_num_seqs=2)
    for number in range(2):
        llm.engine.add_request(str(number), llm.processor.process(case.request()), FIRST_TOKEN)
    events.clear()
    llm.engine.step()
    behind = [events[i + 1 : i + 3] for i, event in enumerate(events) if event == "wait"]
    assert behind[:3] == [["forward", "with_grids"]] * 3


@pytest.mark.skipif(HAS_GPU, reason=GPU_PRESENT)  # counts transfers of the host
def test_a_prefill_sends_and_reads_once_for_each_stage(place: Place, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "c04_g24_r222")
    build_engine(case.write_checkpoint(tmp_path / "checkpoint"), tmp_path / "engine")
    llm = place.load(tmp_path / "engine", max_num_seqs=2)
    assert place.device is not None
    for requests, boundaries in (([case.request()] * 2, 3), ([{"prompt_token_ids": [3, 4, 5]}], 0)):
        for number, request in enumerate(requests):
            llm.engine.add_request(str(number), llm.processor.process(request), FIRST_TOKEN)
        uploads, readings = place.device.uploads, place.device.readings
        assert len(llm.engine.step().finished) == len(requests)
        assert place.device.readings - readings == boundaries
        embedding, stages, first_layout = 1, 4, int(boundaries > 0)
        assert place.device.uploads - uploads == embedding + stages + first_layout


@pytest.mark.skipif(HAS_GPU, reason=GPU_PRESENT)  # counts transfers of the host
@pytest.mark.parametrize(
    ("spec", "readings"),
    [
        ("pyramiddrop:layers=2-4-6,ratios=0.5-0.25-0.1", 3),
        ("fastv:k=2,ratio=0.5", 1),
        ("random:layer=2,keep=0.6", 0),  # the host itself draws the rows
        ("pool:kernel=2x2,layer=2", 0),
    ],
)
def test_a_boundary_that_keeps_rows_is_read_once_at_most(
    place: Place, tmp_path: Path, spec: str, readings: int
) -> None:
    engine = write_random_engine(tmp_path / "engine", dataclasses.replace(MODEL, reduction=NoReduction()))
    llm = place.load(engine, reduce=spec)
    assert place.device is not None
    embeds = torch.randn(16, MODEL.decoder.hidden_size)
    prompt = {"prompt_token_ids": [5, -200, 7], "multi_modal_data": {"image_embeds": embeds}}
    for number in range(2):
        llm.engine.add_request(str(number), llm.processor.process(prompt), FIRST_TOKEN)
    before = place.device.readings
    finished = llm.engine.step().finished
    assert len(finished) == 2 and all(output.error is None for output in finished)
    assert place.device.readings - before == readings
