"""LLaVA-HR's encoder against the eager one in float64, on random weights and pictures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dpn_rt.errors import ConfigError, ImageError
from dpn_rt.format.checks import check_model
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.vision.encoder import CropEncoder, EncodedImage, ImageEncoder, load_encoder
from dpn_rt.model.vision.hr import encoder as hr_encoder
from dpn_rt.model.vision.hr.config import FastConfig, HrConfig, fast_image_size
from dpn_rt.model.vision.hr.convnext_config import ConvNextConfig
from dpn_rt.model.vision.hr.preprocessing import HrPreprocessor
from dpn_rt.model.vision.projector import ProjectorConfig
from dpn_rt.model.vision.visual_input import VisualInput
from dpn_rt.prompts.processor import Processor
from dpn_rt.reference import EagerDpn
from tests.engine.models import MODEL

HIDDEN_SIZE = MODEL.decoder.hidden_size


def vision_config(size: int, *, has_adapters: bool = True, prepools: bool = False, eps: float = 1e-6) -> HrConfig:
    fast = FastConfig(32, 48, 4, 2, fast_image_size(size), 14, 1e-5, "quick_gelu", "patch")
    return HrConfig(size, ConvNextConfig((1, 2, 2, 1), (8, 16, 24, 40), eps), fast, has_adapters, prepools)


CONFIGS = {
    "768": vision_config(768),
    "800": vision_config(800, eps=1e-5),
    "384": vision_config(384),
    "96": vision_config(96),
    "32": vision_config(32),
    "frozen": vision_config(256, has_adapters=False),
    "prepooled": vision_config(800, prepools=True),
}
configs = pytest.mark.parametrize("vision", CONFIGS.values(), ids=CONFIGS.keys())


def model_of(vision: HrConfig) -> ModelConfig:
    projector = ProjectorConfig("mlp2x_gelu", vision.hidden_size)
    return dataclasses.replace(MODEL, vision=vision, projector=projector)


def random_weights(vision: HrConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of tower and projector, in the scale of trained ones, so that no path vanishes."""
    config = model_of(vision)
    assert config.projector is not None
    specs = dict(vision.weight_specs(torch.float32)) | dict(config.projector.weight_specs(HIDDEN_SIZE, torch.float32))
    weights = {}
    for name, spec in specs.items():
        fan_in = spec.shape[-1] if len(spec.shape) > 1 and "depthwise" not in name and "fast_conv" not in name else 9
        weights[name] = (torch.randn(spec.shape) * fan_in**-0.5).to(dtype)
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            weights[name] += 1
    return weights


def eager_tower(vision: HrConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> EagerDpn:
    model = EagerDpn(model_of(vision), torch.float32)
    own = dict(model.canonical_weights()) | {name: weight.float() for name, weight in weights.items()}
    return EagerDpn.from_weights(model_of(vision), own.items(), dtype=torch.float32).to(dtype)


def load(vision: HrConfig, weights: dict[str, Tensor]) -> CropEncoder:
    encoder = load_encoder(vision, model_of(vision).projector, weights, prepack=False)
    assert encoder is not None
    return encoder


def encode(encoder: CropEncoder, images: list[VisualInput]) -> list[EncodedImage]:
    with torch.inference_mode():
        return ImageEncoder(encoder).encode(images)


def random_images(vision: HrConfig, count: int) -> list[VisualInput]:
    preprocessor = HrPreprocessor(vision, pads=True, max_pixels=1 << 24)
    random = np.random.default_rng(torch.initial_seed() % (1 << 32))
    shapes = [(int(random.integers(20, 90)), int(random.integers(20, 90)), 3) for _ in range(count)]
    return [preprocessor(Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8), "RGB")) for shape in shapes]


@configs
def test_float32(vision: HrConfig) -> None:
    weights = random_weights(vision, torch.float32)
    model = eager_tower(vision, weights, torch.float64)
    (image,) = random_images(vision, 1)
    (encoded,) = encode(load(vision, weights), [image])
    with torch.inference_mode():
        expected = model.encode_image(image.views[0])
    assert encoded.grid == vision.grid
    assert encoded.rows.shape == expected.shape == (vision.num_visual_tokens, HIDDEN_SIZE)
    assert (encoded.rows - expected).abs().max() < 1e-5 * expected.abs().max()


@configs
def test_bfloat16_is_as_exact_as_eager(vision: HrConfig) -> None:
    weights = random_weights(vision, torch.bfloat16)
    (image,) = random_images(vision, 1)
    with torch.inference_mode():
        expected = eager_tower(vision, weights, torch.float64).encode_image(image.views[0])
        eager = eager_tower(vision, weights, torch.bfloat16).encode_image(image.views[0])
    (encoded,) = encode(load(vision, weights), [image])
    ours, theirs = ((rows.double() - expected).abs() for rows in (encoded.rows, eager))
    assert ours.max() <= 2 * theirs.max()
    assert ours.pow(2).mean().sqrt() <= 2 * theirs.pow(2).mean().sqrt()


@pytest.mark.parametrize("name", ["96", "384", "prepooled"])
@pytest.mark.parametrize("crops_per_call", [1, 2, 4])
def test_images_do_not_depend_on_each_other(name: str, crops_per_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, where several go through together."""
    vision = CONFIGS[name]
    encoder = load(vision, random_weights(vision, torch.float32))
    images = random_images(vision, 3)
    alone = [encode(encoder, [image])[0].rows for image in images]
    monkeypatch.setattr(hr_encoder.HrEncoder, "crops_per_call", crops_per_call)
    for expected, encoded in zip(alone, encode(encoder, images), strict=True):
        assert torch.allclose(encoded.rows, expected, rtol=1e-4, atol=1e-5)
    assert encode(encoder, []) == []


def test_pixels_of_another_size_are_refused() -> None:
    images = random_images(CONFIGS["96"], 1)
    with pytest.raises(ImageError, match=r"pixels \[3, 96, 96\], expected pixels \[3, 384, 384\]"):
        encode(load(CONFIGS["384"], random_weights(CONFIGS["384"], torch.float32)), images)


@configs
def test_flops_are_those_that_torch_counts(vision: HrConfig) -> None:
    model = eager_tower(vision, random_weights(vision, torch.float32), torch.float32)
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        model.vision(torch.randn(1, 3, vision.image_size, vision.image_size))
    # torch does not count the CPU's attention
    attention = vision.fast.num_layers * 4 * vision.hidden_size * vision.fast.num_rows**2
    assert vision.flops_per_crop == pytest.approx(counter.get_total_flops() + attention, rel=1e-4)


def test_flops_of_the_published_sizes() -> None:
    """TFLOP of hr.md's table, that is of the publication's two models at 1024 pixels."""
    clip_l = FastConfig(1024, 4096, 24, 16, 448, 14, 1e-5, "quick_gelu", "patch")
    large = HrConfig(1024, ConvNextConfig((3, 3, 27, 3), (192, 384, 768, 1536), 1e-6), clip_l, True, False)
    xxlarge = HrConfig(1024, ConvNextConfig((3, 4, 30, 3), (384, 768, 1536, 3072), 1e-5), clip_l, True, False)
    assert large.slow.flops(1024) / 1e12 == pytest.approx(1.44, abs=0.01)
    assert xxlarge.slow.flops(1024) / 1e12 == pytest.approx(6.33, abs=0.02)
    assert large.fast.flops_per_crop / 1e12 == pytest.approx(0.72, abs=0.01)
    projector = ProjectorConfig("mlp2x_gelu", 1024)
    assert (large.mix_flops + projector.flops(1024, 4096)) / 1e12 == pytest.approx(0.08, abs=0.01)
    assert (xxlarge.mix_flops + projector.flops(1024, 5120)) / 1e12 == pytest.approx(0.16, abs=0.01)


# Preprocessing


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (96, 96), (97, 33), (500, 20)], ids=str)
@pytest.mark.parametrize("pads", [True, False])
def test_any_shape_of_image(size: tuple[int, int], pads: bool) -> None:
    vision = CONFIGS["96"]
    image = HrPreprocessor(vision, pads=pads, max_pixels=1 << 24)(Image.new("RGB", size, (10, 200, 30)))
    (view,) = image.views
    assert view.shape == (3, 96, 96)
    assert view.dtype == torch.float32
    assert view.isfinite().all()
    middle = HrPreprocessor(vision, pads=pads, max_pixels=1 << 24).picture(image).getpixel((48, 48))
    if not pads or min(size) * 3 > max(size):
        assert middle == (10, 200, 30)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16", "LA"])
def test_images_that_are_not_rgb_become_rgb(mode: str) -> None:
    processor = Processor(None, model_of(CONFIGS["96"]))
    image = processor.image(Image.new(mode, (40, 30)))
    assert image.views[0].shape == (3, 96, 96)


@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize("size", [(10000, 10), (10, 10000), (1, 100000)])
def test_a_long_image_is_refused_before_it_grows(size: tuple[int, int], pads: bool) -> None:
    vision = vision_config(1024)
    preprocessor = HrPreprocessor(vision, pads=pads, max_pixels=89_478_485)
    with pytest.raises(ImageError, match=rf"image of {size[0]} x {size[1]}.*expected at most 89478485"):
        preprocessor(Image.new("RGB", size))


# Configurations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 512}, "images of 512 pixels give 16 x 16 slow and 24 x 24 fast features"),
        ({"image_size": 384}, "image_size must be 336, got 350"),
        ({"fast": {"num_layers": 6}}, "num_layers must be a multiple of 4, got 6"),
        ({"fast": {"patch_size": 16}}, "patch_size must be 14, got 16"),
        ({"fast": {"num_heads": 5}}, "is not a multiple of its num_heads 5"),
        ({"slow": {"depths": (1, 1, 1)}}, "expected 4 stages"),
        ({"slow": {"dims": (8, 16, 0, 40)}}, r"dims\[2\] must be positive, got 0"),
        ({"slow": {"layer_norm_eps": float("nan")}}, "layer_norm_eps must be a finite number, got nan"),
    ],
    ids=str,
)
def test_contradictions(changes: dict[str, object], message: str) -> None:
    vision = CONFIGS["800"]
    parts = {
        key: dataclasses.replace(getattr(vision, key), **value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    with pytest.raises(ConfigError, match=message):
        check_model(model_of(dataclasses.replace(vision, **parts)))
