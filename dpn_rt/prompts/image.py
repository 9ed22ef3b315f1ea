"""Images from files and libraries -> 8-bit RGB, checked before anything large is decoded."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from dpn_rt.errors import ImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are read, header first. Pillow's readers of other formats decode at once or run programs."""

MAX_PIXELS = 89_478_485
"""Largest number of pixels, in the file and after padding: Pillow's bound for suspicious images, 256 MiB of RGB."""


def load_image(source: Image.Image | str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An upright 8-bit RGB image.

    EXIF rotation is applied, and 16-bit samples are scaled to 8 bits. Alpha is dropped, not blended: LLaVA and
    transformers do the same, and models are trained on the resulting colours.

    Args:
        source: a PIL image (not modified) or the path of a file. The frame of an animation is the current or first one.
        max_pixels: checked from the file's header, before decoding.

    Raises:
        ImageError: it is not a file, not an image, truncated, of zero size, or larger than `max_pixels`.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, _describe(source), max_pixels)
    if not isinstance(source, str | os.PathLike):
        raise ImageError(f"image: expected a PIL image or a path, got {type(source).__name__}")
    name = f"image {os.fspath(source)!r:.200}"
    # Reading a device or pipe would block, and URLs are never fetched.
    if not _is_file(source):
        raise ImageError(f"{name}: no such file (expected a PIL image or the path of an image file)")
    with decode_image(Path(source), name, max_pixels) as image:
        return _to_rgb(image, name, max_pixels)


def decode_image(file: Path | BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A PIL image of which only the header has been read.

    Args:
        name: of the image in messages.

    Raises:
        ImageError: it is not an image, or far too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: too large: {error}; expected at most {max_pixels} pixels") from error
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error and others on bad files
        raise ImageError(
            f"{name}: not an image that can be read, expected one of {', '.join(FORMATS)}: {error}"
        ) from error


def _is_file(source: str | os.PathLike[str]) -> bool:
    try:
        return Path(source).is_file()
    except OSError:  # longer than a name may be, as a data URL is
        return False


def _describe(image: Image.Image) -> str:
    name = getattr(image, "filename", "")
    return f"image {str(name)!r}" if name else f"image (PIL, mode {image.mode})"


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width <= 0 or height <= 0:
        raise ImageError(f"{name}: {width} x {height} pixels, expected at least 1 x 1")
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width} x {height} = {width * height} pixels, expected at most {max_pixels}")
    try:
        image.load()
        return _eight_bit_rgb(_upright(image), name)
    except ImageError:
        raise
    except Exception as error:  # as in `decode_image`: decoders raise anything on bad files
        raise ImageError(f"{name}: truncated or damaged: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data does not make the image unreadable
        return image


def _eight_bit_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_gray(np.asarray(image).astype(np.float32) / 257)
    if image.mode in ("I", "F"):
        return _from_gray(_wide_gray(np.asarray(image), name))
    if image.mode in ("RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    return image.convert("RGB")


def _wide_gray(values: np.ndarray, name: str) -> np.ndarray:
    """32-bit gray values on the scale 0 to 255. The mode does not tell their range, so the values decide."""
    low, high = float(values.min()), float(values.max())
    scales = {1.0: 255.0, 255.0: 1.0, 65535.0: 1 / 257} if values.dtype.kind == "f" else {255.0: 1.0, 65535.0: 1 / 257}
    for largest, scale in scales.items():
        if low >= 0 and high <= largest:
            return values.astype(np.float32) * scale
    raise ImageError(f"{name}: gray values from {low:g} to {high:g}, expected 0 to 65535")


def _from_gray(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
