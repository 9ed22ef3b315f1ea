"""LLaVA-HR in the runtime for GPUs: several images in one graph, and convolutions by torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpn_rt import LLM
from dpn_rt.backends.kernels.encoder_graphs import EncoderGraphs
from dpn_rt.builders.native import build_engine
from dpn_rt.model.vision.hr import encoder as hr_encoder
from dpn_rt.model.vision.hr.depthwise import Depthwise
from dpn_rt.model.vision.visual_input import VisualInput
from tests.backends.kernels.test_golden_device import FIRST_TOKEN, first_error
from tests.backends.kernels.test_graphs import WAITS, OperatorNames
from tests.engine.test_hr import picture
from tests.golden_answers import PARAMS, assert_gives, of_golden
from tests.hr_cases import HR_CASES, HrCase, assert_near, hr_case
from tests.places import Place


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the host stands in for one."""
    init = Depthwise.__init__

    def init_with_torch(self: Depthwise, weights: Mapping[str, Tensor], module: str) -> None:
        init(self, weights, module)
        self.use_torch()

    monkeypatch.setattr(Depthwise, "__init__", init_with_torch)
    monkeypatch.setattr(hr_encoder.HrEncoder, "crops_per_call", hr_encoder.CROPS_ON_DEVICE)


def load(case: HrCase, place: Place, directory: Path) -> LLM:
    build_engine(case.write_checkpoint(directory / "checkpoint"), directory / "engine", dtype=place.dtype)
    return place.load(directory / "engine", max_num_seqs=2)


@pytest.mark.parametrize("case", HR_CASES, ids=lambda case: case.name)
def test_generate_equals_the_published_code(case: HrCase, place: Place, tmp_path: Path) -> None:
    llm = load(case, place, tmp_path)
    if place.device is not None:
        assert_gives(llm.generate(case.request(), PARAMS, use_tqdm=False)[0], of_golden(case), case.name)
        return
    request = case.request() | ({"route": case.experts} if case.is_dpn else {})
    error = first_error(llm.generate(request, FIRST_TOKEN, use_tqdm=False)[0], case)
    on_cpu = LLM(tmp_path / "engine", device="cpu").generate(request, FIRST_TOKEN, use_tqdm=False)[0]
    assert error <= 2 * first_error(on_cpu, case) + 0.01


@pytest.mark.parametrize("name", ["v03", "e05"])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_any_number_of_images(name: str, count: int, place: Place, tmp_path: Path) -> None:
    case = hr_case(name)
    llm = load(case, place, tmp_path)
    encoder = llm.engine.runner.images.encoder
    assert isinstance(encoder, EncoderGraphs)
    assert sorted(encoder._graphs) == [1, 2, 3, 4]
    images: list[VisualInput] = [llm.processor.image(picture((40, 30))) for _ in range(count)]
    with torch.inference_mode():
        together = [encoded.rows.clone() for encoded in encoder.encode(images)]
        alone = [encoder.encode([image])[0].rows for image in images]
    for rows, expected in zip(together, alone, strict=True):
        assert_near(rows.float().cpu(), expected.float().cpu(), name, place.tolerance * float(expected.abs().max()))


def test_its_graphs_can_be_recorded(place: Place, tmp_path: Path) -> None:
    """They wait for no result and make no tensor from the host's numbers."""
    encoder = load(hr_case("v03"), place, tmp_path).engine.runner.images.encoder
    assert isinstance(encoder, EncoderGraphs)
    with torch.inference_mode(), OperatorNames() as operators:
        encoder._graphs[2]._step()
    assert len(operators.names) > 5
    assert not [name for name in operators.names if any(part in name for part in WAITS)]
