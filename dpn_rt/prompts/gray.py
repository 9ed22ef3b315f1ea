"""Gray samples of more than 8 bits -> 8 bits, by the range that the format or the mode fixes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dpn_rt.errors import ImageError

Range = tuple[float, float]
"""The samples that are black and white. White may be the smaller one."""

BAND_PIXELS = 2**18
"""Of an image that are scaled at once."""
_SIXTEEN_BITS = (0.0, 65535.0)
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2


def is_wide_gray(image: Image.Image) -> bool:
    """Whether the samples have more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def gray_range(image: Image.Image) -> Range | None:
    """Of an image in a mode of `is_wide_gray`, as opened; None for floating-point samples, which have none.

    TIFF: all values that its samples can have, 0 being black for signed ones; the tags with the smallest and largest
    sample describe the content and do not count. Anything else, also an image in memory that has lost its format: 0 to
    65535. In mode `I` too: Pillow reads PGM and PNG of 16 bits into it, and scales a PGM from its maxval to 65535.
    """
    tags: Any = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    if image.mode == "F":
        return (1.0, 0.0) if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO else None
    if tags:
        bits = tags.get(_TIFF_BITS, (16,))[0] - (tags.get(_TIFF_SAMPLE_FORMAT, (1,))[0] == _SIGNED)
        black, white = 0.0, float(2**bits - 1)
        return (white, black) if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO else (black, white)
    return _SIXTEEN_BITS


def eight_bits(image: Image.Image, samples: Range | None, name: str) -> Image.Image:
    """An image of mode L from one in a mode of `is_wide_gray`.

    Args:
        samples: by `gray_range`. None: the values decide between 0 to 1, 0 to 255 and 0 to 65535.
        name: of the image in messages.

    Raises:
        ImageError: values beyond the range.
    """
    is_unsigned = samples is not None and max(samples) > np.iinfo(np.int32).max
    low, high = _extrema(image, is_unsigned)
    if samples is None:
        samples = _range_of_values(low, high, name)
    black, white = samples
    if not (low >= min(samples) and high <= max(samples)):
        raise _beyond(low, high, f"{min(samples):.0f} to {max(samples):.0f}", name)
    dtype = np.float32 if max(samples) <= _SIXTEEN_BITS[1] else np.float64
    result = Image.new("L", image.size)
    for top, values in _bands(image, is_unsigned):
        scaled: npt.NDArray[Any] = values.astype(dtype)
        scaled = (scaled - black) * (255 / (white - black))
        result.paste(Image.fromarray(np.rint(scaled).astype(np.uint8)), (0, top))
    return result


def _bands(image: Image.Image, is_unsigned: bool) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """The first row and the samples `[rows, width]` of each band: as floating-point numbers, those of a large image
    would take gigabytes."""
    rows = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        values = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        yield top, values.view(np.uint32) if is_unsigned else values


def _extrema(image: Image.Image, is_unsigned: bool) -> tuple[float, float]:
    """The smallest and the largest sample; NaN where there is one."""
    extrema = np.array([(values.min(), values.max()) for _, values in _bands(image, is_unsigned)], dtype=np.float64)
    return float(extrema[:, 0].min()), float(extrema[:, 1].max())


def _range_of_values(low: float, high: float, name: str) -> Range:
    for white in (1.0, 255.0, 65535.0):
        if low >= 0 and high <= white:
            return 0.0, white
    raise _beyond(low, high, "0 to 65535", name)


def _beyond(low: float, high: float, expected: str, name: str) -> ImageError:
    return ImageError(f"{name}: gray values from {low:g} to {high:g}, expected {expected}")
