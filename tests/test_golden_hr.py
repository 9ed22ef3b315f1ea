"""LLaVA-HR gives the published code's numbers: checkpoint directory -> engine -> `LLM.generate`, and step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dpn_rt import LLM
from dpn_rt.builders.native import build_engine
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.model.vision.encoder import ImageEncoder, load_encoder
from dpn_rt.model.vision.hr.config import HrConfig
from dpn_rt.model.vision.hr.encoder import HrEncoder
from tests.golden_answers import PARAMS, assert_gives, of_golden
from tests.hr_cases import HR_CASES, HrCase, assert_near, hr_case

PIXEL_TOLERANCE = 2e-5
"""Rounding of the normalisation in float32."""

golden = pytest.mark.parametrize("case", HR_CASES, ids=lambda case: case.name)


def build(case: HrCase, directory: Path) -> EngineDir:
    return build_engine(case.write_checkpoint(directory / "checkpoint"), directory / "engine")


@golden
def test_generate_equals_the_published_code(case: HrCase, tmp_path: Path) -> None:
    build(case, tmp_path)
    llm = LLM(tmp_path / "engine", device="cpu")
    output = llm.generate(case.request(), PARAMS, use_tqdm=False)[0]
    assert_gives(output, of_golden(case), case.name)
    assert list(output.prompt_token_ids) == case.prompt_token_ids


@golden
def test_every_step_of_the_encoder(case: HrCase, tmp_path: Path) -> None:
    engine = build(case, tmp_path)
    weights, vision = engine.load_weights(), engine.model.vision
    assert isinstance(vision, HrConfig)
    encoder = load_encoder(vision, engine.model.projector, weights, prepack=False)
    assert isinstance(encoder, HrEncoder)
    preprocessor = vision.preprocessor(
        None, pads=case.published_config["image_aspect_ratio"] == "pad", max_pixels=1 << 30
    )
    assert preprocessor is not None
    image = preprocessor(case.image)
    pixels = image.views[0].unsqueeze(0)
    step = int(case.meta["row_step"])
    with torch.inference_mode():
        assert_near(pixels[0, :, ::16, ::16], case.tensor("pixel_values_sub"), "pixels", PIXEL_TOLERANCE)
        fast = encoder.fast_pixels(pixels)[0, :, ::8, ::8]
        assert_near(fast, case.tensor("fast_pixels_sub"), "fast pixels", PIXEL_TOLERANCE)
        slow = encoder.slow.forward(pixels)
        rows = slow.flatten(0, 2)
        if "slow_features" in case.arrays:
            assert_near(rows, case.tensor("slow_features").flatten(1).t(), "slow features")
        else:
            assert_near(rows[::step], case.tensor("slow_features_rows"), "slow features")
        embedded = encoder.fast.embed(encoder.fast_pixels(pixels))
        assert_near(embedded[::step], case.tensor("fast_pre_rows"), "fast rows before the first layer")
        mixed = encoder.mixed(slow, pixels)
        if "tower_out" in case.arrays:
            assert_near(mixed, case.tensor("tower_out"), "tower")
        else:
            assert_near(mixed[::step], case.tensor("tower_out_rows"), "tower")
        (encoded,) = ImageEncoder(encoder).encode([image])
    assert_near(encoded.rows, case.tensor("image_features"), "image features")


@pytest.mark.parametrize("name", ["v02", "e03"])
def test_shards_of_torch(name: str, tmp_path: Path) -> None:
    """The published checkpoints are `.bin` files."""
    case = hr_case(name)
    build_engine(case.write_checkpoint(tmp_path / "c", file_format="bin"), tmp_path / "bin")
    first = build(case, tmp_path)
    second = EngineDir.open(tmp_path / "bin")
    assert first.files["weights.safetensors"] == second.files["weights.safetensors"]
