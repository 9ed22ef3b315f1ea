"""Steps from an image to views that all encoders share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from dpn_rt.errors import EngineError, ImageError
from dpn_rt.model.vision.clip.preprocessing import ClipPreprocessor
from dpn_rt.model.vision.preprocessing import CLIP_MEAN_COLOUR, load_image_processor, pad_to_square
from dpn_rt.prompts.image import load_image
from tests.engine.models import VISION

PLENTY = 1_000_000


def random_rgb(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("size", "offset"), [((7, 4), (0, 1)), ((4, 7), (1, 0)), ((5, 5), (0, 0)), ((1, 6), (2, 0))])
def test_padding_is_centred_on_the_mean_colour(size: tuple[int, int], offset: tuple[int, int]) -> None:
    image = random_rgb(*size)
    square = pad_to_square(image, PLENTY)
    side = max(size)
    assert square.mode == "RGB" and square.size == (side, side)
    expected = np.empty((side, side, 3), dtype=np.uint8)
    expected[:] = CLIP_MEAN_COLOUR
    expected[offset[1] : offset[1] + size[1], offset[0] : offset[0] + size[0]] = np.asarray(image)
    np.testing.assert_array_equal(np.asarray(square), expected)


def test_padding_has_the_pixel_limit_too() -> None:
    with pytest.raises(ImageError, match="200 x 1: 40000 pixels when padded"):
        pad_to_square(random_rgb(200, 1), max_pixels=39_999)


def test_a_missing_image_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot load the image processor"):
        load_image_processor(tmp_path)


PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56}, "crop_size": 56},
    "CLIP without a crop": {
        "image_processor_type": "CLIPImageProcessor", "size": {"height": 56, "width": 56}, "do_center_crop": False,
    },
    "CLIP, larger than its crop": {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 61}, "crop_size": 56, "resample": 2,
    },
    "CLIP, both bounds": {
        "image_processor_type": "CLIPImageProcessor", "crop_size": 56,
        "size": {"shortest_edge": 56, "longest_edge": 80},
    },
    "CLIP that resizes nothing": {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "crop_size": 56},
    "SigLIP": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 56}, "resample": 3},
    "another": {"image_processor_type": "ViTImageProcessor", "size": {"height": 56, "width": 56}},
}  # fmt: skip


@pytest.mark.parametrize("size", [(56, 56), (57, 56), (100, 61), (61, 100), (9, 200), (333, 7), (1, 1)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_clip_pixels_are_those_of_transformers(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name]))
    image = random_rgb(*size)
    expected = torch.as_tensor(load_image_processor(tmp_path)(image, return_tensors="pt")["pixel_values"])[0]
    prepared = ClipPreprocessor(tmp_path, VISION, pads=False, max_pixels=PLENTY)(image)
    assert torch.equal(prepared.views[0], expected.to(torch.float32))


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_one_transparent_colour_is_not_blended(name: str, tmp_path: Path) -> None:
    """transformers would put it on white."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name]))
    prepare = ClipPreprocessor(tmp_path, VISION, pads=False, max_pixels=PLENTY)
    black = Image.new("RGB", (64, 64))
    expected = prepare(black).views[0]
    black.save(tmp_path / "colour.png", transparency=(0, 0, 0))
    black.convert("L").save(tmp_path / "gray.png", transparency=0)
    black.convert("P").save(tmp_path / "palette.gif", transparency=0)
    black.info["transparency"] = (0, 0, 0)
    for source in (black, *(tmp_path / file for file in ("colour.png", "gray.png", "palette.gif"))):
        assert torch.equal(prepare(load_image(source)).views[0], expected), source
    assert black.info == {"transparency": (0, 0, 0)}


def test_the_package_of_transformers_may_ask_for_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of some versions does where there is none, though the processor on PIL needs none."""

    class AsksForTorchvision:
        @classmethod
        def from_pretrained(cls, *_: object, **__: object) -> None:
            raise ImportError("AutoImageProcessor requires the Torchvision library")

    transformers.CLIPImageProcessor().save_pretrained(tmp_path)
    monkeypatch.setattr(sys.modules["transformers"], "AutoImageProcessor", AsksForTorchvision)
    assert load_image_processor(tmp_path).size == {"shortest_edge": 224}
