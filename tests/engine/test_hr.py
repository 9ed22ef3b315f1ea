"""LLaVA-HR requests in the engine: mixed routes in one batch, image cache, reductions, bad images, 8-bit weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.errors import ImageError
from dpn_rt.format import flops
from dpn_rt.model.reduction.spec import parse_spec
from dpn_rt.model.vision.hr.encoder import HrEncoder
from dpn_rt.reference import EagerDpn
from dpn_rt.reference.reduced import EagerReduced
from tests.engine.answers import assert_same_tokens
from tests.engine.margins import recorded_margins
from tests.golden_answers import PARAMS, assert_gives, of_golden
from tests.hr_cases import HrCase, assert_near, hr_case

ROUTES = [[0, 0, 0], [0, 1, 2], [2, 2, 2], [1, 1, 1], [2, 0, 1]]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images per call of the tower."""
    calls: list[int] = []
    forward = HrEncoder.forward

    def counted(self: HrEncoder, views: Any) -> Any:
        calls.append(len(views[0]))
        return forward(self, views)

    monkeypatch.setattr(HrEncoder, "forward", counted)
    return calls


def load(case: HrCase, directory: Path, **options: Any) -> LLM:
    build_engine(case.write_checkpoint(directory / "checkpoint"), directory / "engine")
    return LLM(directory / "engine", device="cpu", **options)


def picture(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8).numpy())


@pytest.mark.parametrize("name", ["e01", "e03", "e05"])
def test_a_batch_of_different_routes(name: str, tmp_path: Path) -> None:
    """Also text alone; each request gives what it gives alone, and the golden one the published numbers."""
    case = hr_case(name)
    llm = load(case, tmp_path)
    requests = [case.request()]
    for index, route in enumerate(ROUTES):
        media = {"image": picture((30 + 20 * index, 60))}
        requests.append({"prompt_token_ids": case.prompt_token_ids, "multi_modal_data": media, "route": route})
    requests.append({"prompt_token_ids": [1, 5, 9, 20]})
    alone = [llm.generate(request, PARAMS, use_tqdm=False)[0] for request in requests]
    together = llm.generate(requests, PARAMS, use_tqdm=False)
    assert_gives(together[0], of_golden(case), case.name)
    for first, second in zip(alone, together, strict=True):
        assert first.pyramid.experts == second.pyramid.experts
        assert first.pyramid.kv_lengths == second.pyramid.kv_lengths
        assert_same_tokens(second, first)
    assert len({tuple(output.pyramid.kv_lengths) for output in together}) > 3


def test_images_are_encoded_once_and_text_never(tmp_path: Path, encoded: list[int]) -> None:
    case = hr_case("e04")
    llm = load(case, tmp_path, reuse_bytes=1 << 24)
    for _ in range(2):
        assert_gives(llm.generate(case.request(), PARAMS, use_tqdm=False)[0], of_golden(case), case.name)
    assert encoded == [1]
    llm.generate({"prompt_token_ids": [1, 5, 9, 20]}, PARAMS, use_tqdm=False)
    assert encoded == [1]
    other = {"prompt_token_ids": case.prompt_token_ids, "multi_modal_data": {"image": picture((40, 40))}}
    llm.generate([other, case.request(), other], PARAMS, use_tqdm=False)
    assert encoded == [1, 1]


@pytest.mark.parametrize("spec", ["fastv:k=1,ratio=0.5", "pool:kernel=2x2,layer=0", "divprune:keep=0.1"])
@pytest.mark.parametrize("name", ["v03", "d02"])
def test_reductions_of_dense_models(name: str, spec: str, tmp_path: Path) -> None:
    case = hr_case(name)
    llm = load(case, tmp_path, reduce=spec)
    model = EagerDpn.from_engine(tmp_path / "engine")
    embeds = case.tensor("image_features")
    chain = parse_spec(spec, llm.model.decoder.num_layers)
    with recorded_margins() as margins:
        output = llm.generate(case.request(), PARAMS, use_tqdm=False)[0]
    expected = EagerReduced(model, chain).generate(case.prompt_token_ids, embeds, max_new_tokens=7)
    assert min(margins, default=1.0) > 1e-6
    assert output.pyramid.kept == expected.kept
    assert list(output.outputs[0].token_ids) == expected.token_ids


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("name", ["v06", "e01"])
def test_quantised_engines(name: str, quantize: Any, tmp_path: Path) -> None:
    """Weights of the tower's products have 8 bits; rows of 8 to 48 features are rounded coarsely."""
    case = hr_case(name)
    path = case.write_checkpoint(tmp_path / "checkpoint")
    dense = build_engine(path, tmp_path / "dense")
    engine = build_engine(path, tmp_path / "engine", quantize=quantize)
    stored = engine.load_weights()
    for part in ("slow.stages.2.blocks.0.fc1", "adapters.1.slow_conv", "layers.3.fc2", "mix.slow_proj"):
        assert f"vision.{part}.int8" in stored
        assert f"vision.{part}.weight" in dense.load_weights()
    llm = LLM(tmp_path / "engine")
    params = SamplingParams(max_tokens=1, temperature=0.0)
    output = llm.generate(case.request(), params, use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) == 1
    image = llm.processor.image(case.image)
    with torch.inference_mode():
        (encoded,) = llm.engine.runner.images.encoder.encode([image])
    expected = case.tensor("image_features")
    assert_near(encoded.rows, expected, "image features", 0.25 * float(expected.abs().max()))


BAD_IMAGES = [(10000, 10), (10, 10000)]


@pytest.mark.parametrize("name", ["v01", "v05"])
def test_bad_images_are_refused_and_others_served(name: str, tmp_path: Path) -> None:
    case = hr_case(name)
    llm = load(case, tmp_path)
    for size in BAD_IMAGES:
        request = {"prompt_token_ids": case.prompt_token_ids, "multi_modal_data": {"image": Image.new("RGB", size)}}
        with pytest.raises(ImageError, match=f"image of {size[0]} x {size[1]}"):
            llm.generate(request, PARAMS, use_tqdm=False)
    for image in (Image.new("RGB", (1, 1)), Image.new("L", (40, 20)), Image.new("RGBA", (20, 40))):
        request = {"prompt_token_ids": case.prompt_token_ids, "multi_modal_data": {"image": image}}
        output = llm.generate(request, PARAMS, use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) == 7
    assert_gives(llm.generate(case.request(), PARAMS, use_tqdm=False)[0], of_golden(case), case.name)


@pytest.mark.parametrize("name", ["v02", "e02"])
def test_several_images_in_a_prompt(name: str, tmp_path: Path) -> None:
    """Each with the rows that it has alone."""
    case = hr_case(name)
    llm = load(case, tmp_path)
    llm.processor.max_images = 2
    ids = case.prompt_token_ids
    place = ids.index(-200)
    request = {
        "prompt_token_ids": [*ids[:place], -200, 5, *ids[place:]],
        "multi_modal_data": {"image": [case.image, picture((50, 20))]},
    }
    output = llm.generate(request, PARAMS, use_tqdm=False)[0]
    assert output.pyramid.visual_tokens[0] == 2048


@pytest.mark.parametrize("name", ["d01", "e01"])
def test_flops_of_the_tower_are_counted(name: str, tmp_path: Path) -> None:
    model = load(hr_case(name), tmp_path).model
    assert model.vision is not None and model.projector is not None
    projector = model.projector.flops(1024, model.decoder.hidden_size)
    assert flops.vision_flops(model) == model.vision.flops_per_crop + projector
