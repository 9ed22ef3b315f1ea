"""The eager model reads the checkpoints that the builders read, and writes checkpoints that they read back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.models.shapes import SHAPES, prompt_token_ids, random_weights
from dpn_rt.builders.native import build_engine
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.config import RopeConfig
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.reference import EagerDpn
from tests.golden_cases import CASES, GoldenCase

TINY = SHAPES["tiny"].model("float32")
TINY = dataclasses.replace(
    TINY,
    prompt=dataclasses.replace(TINY.prompt, image_aspect_ratio="pad"),
    vision=dataclasses.replace(TINY.vision, image_size=56, activation="gelu", layer_norm_eps=1e-6),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_builders_and_the_direct_name_map_agree(case: GoldenCase, tmp_path: Path) -> None:
    file_format = "bin" if case.meta["seed"] % 2 else "safetensors"
    engine = build_engine(case.write_checkpoint(tmp_path / "checkpoint", file_format=file_format), tmp_path / "engine")
    config = case.config
    if not config.reduction.use_router_token:
        config = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, router_token_id=None))
    expected_prompt = dataclasses.replace(config.prompt, image_aspect_ratio=engine.model.prompt.image_aspect_ratio)
    assert engine.model == dataclasses.replace(config, prompt=expected_prompt)
    weights, expected = engine.load_weights(), case.canonical_weights()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def models() -> dict[str, ModelConfig]:
    pyramid = TINY.reduction
    static = tuple(dataclasses.replace(boundary, kernels=((2, 2),)) for boundary in pyramid.boundaries)
    rope = dataclasses.replace(TINY.decoder, rope=RopeConfig(5e4, '{"factor": 2.0, "rope_type": "linear"}'))
    assert TINY.projector is not None and TINY.vision is not None
    return {
        "adaptive": TINY,
        "conv-v2-square": dataclasses.replace(
            TINY,
            reduction=dataclasses.replace(pyramid, pooling_function="conv", router_version="v2"),
            prompt=dataclasses.replace(TINY.prompt, image_aspect_ratio="processor"),
        ),
        "static": dataclasses.replace(
            TINY,
            reduction=dataclasses.replace(pyramid, boundaries=static, pooling_type="static", use_router_token=False),
        ),
        "dense-linear-tied-bias": dataclasses.replace(
            TINY,
            reduction=NoReduction(),
            projector=dataclasses.replace(TINY.projector, type="linear"),
            decoder=dataclasses.replace(TINY.decoder, tie_word_embeddings=True, qkv_bias=True, o_bias=True),
        ),
        "rope-cls": dataclasses.replace(
            TINY,
            reduction=NoReduction(),
            decoder=rope,
            vision=dataclasses.replace(TINY.vision, select_feature="cls_patch"),
        ),
    }


@pytest.mark.parametrize("name", models())
def test_a_saved_checkpoint_is_read_back(name: str, tmp_path: Path) -> None:
    config = models()[name]
    if not config.reduction.use_router_token:
        config = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, router_token_id=None))
    model = EagerDpn.from_weights(config, random_weights(config))
    model.save_checkpoint(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    read = EagerDpn.from_checkpoint(tmp_path)
    written = dataclasses.replace(
        read.config, prompt=dataclasses.replace(read.config.prompt, has_image_processor=False)
    )  # the builder derives an image processor from the vision tower's configuration
    assert written == config
    ids, pixels = prompt_token_ids(config), torch.randn(3, 56, 56)
    with torch.inference_mode():
        assert torch.equal(model(ids, pixels).logits, read(ids, pixels).logits)


def test_extra_files_are_copied(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    EagerDpn(TINY).save_checkpoint(tmp_path / "out", [tmp_path / "tokenizer.json"])
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
