"""Steps from an image to views that all encoders share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpn_rt.errors import EngineError, ImageError
from dpn_rt.model.vision.preprocessing import CLIP_MEAN_COLOUR, load_image_processor, pad_to_square

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
