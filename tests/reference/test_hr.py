"""The eager LLaVA-HR against the published code, and its ConvNeXt against transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import ConvNextConfig as TransformersConfig
from transformers import ConvNextModel

from dpn_rt.builders.native import build_engine
from dpn_rt.model.vision.hr.convnext_config import ConvNextConfig
from dpn_rt.model.vision.hr.preprocessing import HrPreprocessor
from dpn_rt.reference import EagerDpn
from dpn_rt.reference.convnext import ConvNext
from tests.hr_cases import HR_CASES, HrCase, assert_near, hr_case


def pixels_of(case: HrCase, model: EagerDpn) -> torch.Tensor:
    pads = case.published_config["image_aspect_ratio"] == "pad"
    return HrPreprocessor(model.config.vision, pads=pads, max_pixels=1 << 30)(case.image).views[0]


@pytest.mark.parametrize("case", HR_CASES, ids=lambda case: case.name)
def test_golden(case: HrCase, tmp_path: Path) -> None:
    model = EagerDpn.from_checkpoint(case.write_checkpoint(tmp_path / "c"))
    pixels = pixels_of(case, model)
    with torch.inference_mode():
        features = model.encode_image(pixels)
    assert_near(features, case.tensor("image_features"), "image features")
    output = model.generate(case.prompt_token_ids, pixels, max_new_tokens=7, ignore_eos=True)
    assert output.token_ids == case.generated_ids
    assert list(output.trace.experts) == case.experts
    assert list(output.trace.visual_tokens) == case.visual_tokens
    logprobs = torch.log_softmax(output.logits.double(), dim=-1)
    assert_near(logprobs, case.logprobs, "log-probabilities")


@pytest.mark.parametrize("name", ["v04", "e03", "e05", "v07"])
def test_a_written_checkpoint_is_the_same_model(name: str, tmp_path: Path) -> None:
    case = hr_case(name)
    model = EagerDpn.from_checkpoint(case.write_checkpoint(tmp_path / "c"))
    first = build_engine(tmp_path / "c", tmp_path / "first")
    model.save_checkpoint(tmp_path / "written")
    second = build_engine(tmp_path / "written", tmp_path / "second")
    assert first.model.vision == second.model.vision
    assert first.model.reduction == second.model.reduction
    before, after = first.load_weights(), second.load_weights()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


PARTS = {
    "embeddings.patch_embeddings": "stem.0",
    "embeddings.layernorm": "stem.1",
    "encoder.stages": "stages",
    "downsampling_layer": "downsample",
    "layers": "blocks",
    "layer_scale_parameter": "weight",
    "dwconv": "conv_dw",
    "layernorm": "norm",
    "pwconv1": "mlp.fc1",
    "pwconv2": "mlp.fc2",
}


def published_name(name: str) -> str:
    """transformers' name of a weight -> timm's."""
    for theirs, ours in PARTS.items():
        name = name.replace(theirs, ours)
    return name


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
@pytest.mark.parametrize(
    ("side", "depths", "dims"), [(64, (1, 2, 3, 1), (8, 12, 16, 40)), (97, (2, 1, 1, 2), (6, 8, 8, 10))]
)
def test_convnext_is_transformers(side: int, depths: tuple[int, ...], dims: tuple[int, ...], eps: float) -> None:
    theirs = ConvNextModel(
        TransformersConfig(hidden_sizes=list(dims), depths=list(depths), layer_norm_eps=eps, hidden_act="gelu")
    ).double()
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm) or hasattr(module, "eps"):
            module.eps = eps  # transformers has 1e-6 in all but the last norm
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = ConvNext(ConvNextConfig(depths, dims, eps)).double()
    weights = {published_name(name): weight for name, weight in theirs.state_dict().items()}
    ours.load_state_dict({name: weight for name, weight in weights.items() if name in ours.state_dict()})
    pixels = torch.randn(2, 3, side, side, dtype=torch.float64)
    with torch.inference_mode():
        expected = theirs(pixels).last_hidden_state
        assert torch.allclose(ours(pixels), expected, rtol=1e-9, atol=1e-9)
