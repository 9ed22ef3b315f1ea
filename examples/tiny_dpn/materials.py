"""Photographs, handwritten digits and fonts of the scenes; they come with ordinary packages, not from the network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import skimage
from PIL import Image, ImageFont
from sklearn.datasets import load_digits, load_sample_images

PHOTOS = ("astronaut", "cat", "coffee", "coins", "flower", "rocket", "stars", "temple")
PHOTO_HEIGHT = 160
"""Photographs are scaled to this height; scenes show random crops of them, scaled down again."""

_SKIMAGE_FILES = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "rocket": "rocket.jpg",
    "stars": "hubble_deep_field.jpg",
}
_SKLEARN_FILES = {"flower": "flower.jpg", "temple": "china.jpg"}
_FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSerif-Bold.ttf")
FONT_SIZE = 13
"""Pixels; capitals and figures are then 9 or 10 pixels high."""


@dataclass(frozen=True, eq=False)
class Materials:
    """Everything that the data set reads from disk."""

    photos: dict[str, Image.Image]
    digits: np.ndarray
    """[1797, 8, 8] uint8, 0 paper to 255 ink: scikit-learn's handwritten digits."""
    digit_values: np.ndarray
    """[1797]"""
    fonts: tuple[ImageFont.FreeTypeFont, ...]


@cache
def load_materials() -> Materials:
    """The materials, read on the first call."""
    folder = Path(skimage.__file__).parent / "data"
    photos = {name: Image.open(folder / file) for name, file in _SKIMAGE_FILES.items()}
    bundled = load_sample_images()
    for name, file in _SKLEARN_FILES.items():
        index = next(i for i, path in enumerate(bundled.filenames) if Path(path).name == file)
        photos[name] = Image.fromarray(bundled.images[index])
    digits = load_digits()
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return Materials(
        photos={name: _shrink(photos[name].convert("RGB")) for name in PHOTOS},
        digits=np.round(digits.images * (255 / 16)).astype(np.uint8),
        digit_values=digits.target.astype(int),
        fonts=tuple(ImageFont.truetype(str(fonts / name), FONT_SIZE) for name in _FONTS),
    )


def _shrink(photo: Image.Image) -> Image.Image:
    width = round(photo.width * PHOTO_HEIGHT / photo.height)
    return photo.resize((width, PHOTO_HEIGHT), Image.Resampling.LANCZOS)
