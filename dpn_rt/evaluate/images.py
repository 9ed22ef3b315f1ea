"""Images of questions, opened when their turn comes."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from dpn_rt.errors import ImageError
from dpn_rt.prompts.data_url import decode_data_url, is_data_url
from dpn_rt.prompts.image import decode_image

MAX_IMAGE_BYTES = 2**28
"""Of an image within a table."""
LEAST_BASE64 = 100
"""Characters of an image in base64; a shorter text is the name of a file."""


@dataclass(frozen=True)
class ImageFile:
    """An image in a file."""

    path: Path

    def open(self) -> Path:
        """What `LLM.chat` takes as an image."""
        return self.path


@dataclass(frozen=True)
class ImageBytes:
    """An image within a table."""

    name: str
    """For messages."""
    content: bytes | str = field(repr=False)
    """Of an image file, or that in base64."""

    def open(self) -> Image.Image:
        """What `LLM.chat` takes as an image.

        Raises:
            ImageError: it is not base64, or not an image.
        """
        if isinstance(self.content, bytes):
            return decode_image(io.BytesIO(self.content), self.name)
        url = self.content if is_data_url(self.content) else f"data:image/unknown;base64,{self.content}"
        return decode_image(io.BytesIO(decode_data_url(url, MAX_IMAGE_BYTES)), self.name)


ImageSource = ImageFile | ImageBytes


def image_source(value: Any, folder: Path, place: str) -> ImageSource:
    """The image that a row names or holds.

    Args:
        value: name of a file in `folder`, a data URL, base64, bytes, or parquet's `{"bytes": ..., "path": ...}`.
        folder: of image files.
        place: of the row.

    Raises:
        ImageError: the value is none of these.
    """
    if isinstance(value, dict):
        content = value.get("bytes")
        value = value.get("path") if content is None else content
    if isinstance(value, bytes):
        return ImageBytes(f"image of {place}", value)
    if isinstance(value, str) and value:
        is_base64 = "." not in value and len(value) >= LEAST_BASE64
        is_name = not (is_base64 or is_data_url(value))
        return ImageFile(folder / value) if is_name else ImageBytes(f"image of {place}", value)
    raise ImageError(f"image of {place}: expected the name of a file, base64 or bytes, got {type(value).__name__}")
