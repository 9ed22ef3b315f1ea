"""Vision encoders that two ranks share give what one gives alone; each rank has about half of the weights."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpn_rt.format.config import ModelConfig, VisionConfig
from dpn_rt.format.weight_spec import canonical_specs
from dpn_rt.model.ranks import RankGroup
from dpn_rt.model.shards import Shard
from dpn_rt.model.vision.anyres.config import AnyresConfig
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.encoder import CropEncoder, encoder_pairs, load_encoder
from dpn_rt.model.vision.hr.config import FastConfig, HrConfig, fast_image_size
from dpn_rt.model.vision.hr.convnext_config import ConvNextConfig
from dpn_rt.model.vision.projector import ProjectorConfig
from dpn_rt.model.vision.siglip.config import SiglipConfig
from dpn_rt.model.weights.forms import quantized_form
from dpn_rt.schema.dtypes import Quantize
from tests.engine.models import MODEL, random_weights

CLIP = ClipConfig(64, 96, 2, 4, 56, 14, 1e-5, "quick_gelu", "patch")
SIGLIP = SiglipConfig(64, 160, 2, 2, 56, 14, 1e-6, "gelu_tanh", "patch")
FAST = FastConfig(64, 96, 4, 4, fast_image_size(96), 14, 1e-5, "quick_gelu", "patch")
ENCODERS: dict[str, VisionConfig] = {
    "clip": CLIP,
    "siglip": SIGLIP,
    "tiles": AnyresConfig(CLIP, ((56, 112),), None, "tiled"),
    "hr": HrConfig(96, ConvNextConfig((1, 2, 1, 1), (32, 32, 32, 64), 1e-6), FAST, True, False),
}
encoders = pytest.mark.parametrize("vision", ENCODERS.values(), ids=ENCODERS.keys())


class ThreadGroup:
    """A `RankGroup` of threads."""

    def __init__(self, rank: int, parts: list[Tensor], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(parts)
        self._parts, self._barrier = parts, barrier

    def sum(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._all(x)).sum(0))

    def join(self, x: Tensor) -> Tensor:
        return torch.cat(self._all(x), dim=1)

    def _all(self, x: Tensor) -> list[Tensor]:
        self._parts[self.rank] = x
        self._barrier.wait(60)
        parts = [part.clone() for part in self._parts]
        self._barrier.wait(60)
        return parts


def model_of(vision: VisionConfig, quantize: Quantize) -> ModelConfig:
    newline = isinstance(vision, AnyresConfig)
    projector = ProjectorConfig("mlp2x_gelu", vision.hidden_size, has_newline=newline)
    return replace(MODEL, vision=vision, projector=projector, quantize=quantize)


def weights_of(model: ModelConfig) -> dict[str, Tensor]:
    """Of the whole engine, in the form that it is quantised to."""
    specs, weights = canonical_specs(model), {}
    dense = random_weights(replace(model, quantize="none"), seed=torch.initial_seed() % 2**31)
    for name, tensor in dense:
        form = quantized_form(specs[name], model.quantize)
        if form is None:
            weights[name] = tensor
        else:
            module = name.removesuffix(".weight")
            weights |= {f"{module}.{suffix}": part for suffix, part in form.quantize(tensor).items()}
    return weights


def load(model: ModelConfig, weights: Mapping[str, Tensor], group: RankGroup | None = None) -> CropEncoder:
    encoder = load_encoder(model.vision, model.projector, weights, prepack=False, group=group)
    assert encoder is not None
    return encoder


def parts_of(model: ModelConfig, weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    pairs = encoder_pairs(model.vision, model.projector, model.decoder.hidden_size)
    assert pairs and all(pair.divides(model.quantize, 2) for pair in pairs)
    return [Shard(model.decoder, rank, 2, pairs).tensors(weights) for rank in range(2)]


def encode_on_both(model: ModelConfig, parts: list[dict[str, Tensor]], views: list[Tensor]) -> list[Tensor]:
    slots, barrier = [torch.empty(0)] * 2, threading.Barrier(2)

    def encode(rank: int) -> Tensor:
        with torch.inference_mode():
            return load(model, parts[rank], ThreadGroup(rank, slots, barrier)).forward(views)

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(encode, range(2)))


@encoders
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_equals_one_rank(vision: VisionConfig, quantize: Quantize) -> None:
    """Products in 8 bits to the last bit: ranks join whole rows before these are rounded."""
    model = model_of(vision, quantize)
    weights = weights_of(model)
    views = [torch.randn(3, *shape) for shape in vision.view_shapes]
    with torch.inference_mode():
        expected = load(model, weights).forward(views)
    for rows in encode_on_both(model, parts_of(model, weights), views):
        if quantize == "none":
            torch.testing.assert_close(rows, expected, atol=1e-4, rtol=1e-5)
        else:
            assert torch.equal(rows, expected), (rows - expected).abs().max()


@encoders
def test_each_rank_has_about_half(vision: VisionConfig) -> None:
    """Of what is cut; the rest is less than a tenth in real encoders, not in these."""
    model = model_of(vision, "none")
    weights = weights_of(model)
    parts = parts_of(model, weights)
    pairs = encoder_pairs(model.vision, model.projector, model.decoder.hidden_size)
    cut = {f"{module}.weight" for pair in pairs for module in (pair.first, pair.second)}
    assert {2 * parts[rank][name].numel() / weights[name].numel() for rank in range(2) for name in cut} == {1}


def test_large_encoders_are_shared_but_for_little() -> None:
    """CLIP-L/14 at 336 pixels, SigLIP so400m, LLaVA-HR's two: weights outside of pairs."""
    clip = ClipConfig(1024, 4096, 23, 16, 336, 14, 1e-5, "quick_gelu", "patch")
    siglip = SiglipConfig(1152, 4304, 26, 16, 384, 14, 1e-6, "gelu_tanh", "patch")
    fast = FastConfig(1024, 4096, 24, 16, 448, 14, 1e-5, "quick_gelu", "patch")
    hr = HrConfig(1024, ConvNextConfig((3, 4, 27, 3), (192, 384, 768, 1536), 1e-6), fast, True, False)
    for vision in (clip, siglip, hr):
        pairs = [*vision.layer_pairs()]
        cut = {f"{module}.weight" for pair in pairs for module in (pair.first, pair.second)}
        sizes = {name: torch.Size(spec.shape).numel() for name, spec in vision.weight_specs(torch.float32)}
        assert sum(size for name, size in sizes.items() if name not in cut) < 0.08 * sum(sizes.values()), vision.type
        assert all(pair.divides("none", 2) for pair in pairs)
