"""Images to CLIP's pixel values, through transformers' own image processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dpn_rt.errors import ImageError
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.preprocessing import load_image_processor, pad_to_square, picture_of
from dpn_rt.model.vision.visual_input import VisualInput

PLAIN_PROCESSORS = ("CLIPImageProcessor", "SiglipImageProcessor")
"""They resize by Pillow, then crop, scale and normalise. Others may do more."""


class ClipPreprocessor:
    """A `Preprocessor`: resizes, crops and normalises as the checkpoint's `preprocessor_config.json` says."""

    def __init__(self, directory: Path, config: ClipConfig, *, pads: bool, max_pixels: int) -> None:
        """
        Args:
            directory: holds `preprocessor_config.json` (or `processor_config.json`).
            config: of the tower, for the size that must come out.
            pads: pad images to a square first.
            max_pixels: bound of every intermediate image.

        Raises:
            EngineError: the image processor cannot be loaded.
        """
        self._config, self._pads, self._max_pixels = config, pads, max_pixels
        self._processor = load_image_processor(directory)
        self._keeps_aspect = "shortest_edge" in self._processor.size

    def __call__(self, image: Image.Image, num_images: int = 1) -> VisualInput:
        """One view `[3, image_size, image_size]` of an RGB image.

        Raises:
            ImageError: the image is too elongated, or comes out with another size than the tower's.
        """
        if self._pads:
            image = pad_to_square(image, self._max_pixels)
        width, height = image.size
        side = self._config.image_size
        # CLIP scales the short side to its input: a very long image would grow without bound on the way.
        scaled = side**2 * max(width, height) // min(width, height)
        if self._keeps_aspect and scaled > self._max_pixels:
            raise ImageError(
                f"image of {width} x {height}: scaled to a short side of {side} it has {scaled} pixels, "
                f"expected at most {self._max_pixels}"
            )
        pixels = torch.as_tensor(self._pixel_values(image), device="cpu")[0]
        if tuple(pixels.shape) != (3, side, side):
            raise ImageError(
                f"image of {width} x {height}: the image processor gave pixel values {list(pixels.shape)}, "
                f"the vision tower takes {[3, side, side]}"
            )
        pixels = pixels.to(torch.float32).contiguous()
        return VisualInput.of_views((pixels,), self._config.grid, self._config.num_visual_tokens)

    def _pixel_values(self, image: Image.Image) -> Any:
        """`[1, 3, height, width]`.

        Where it is known how the image processor resizes, that is done here. The processor would do it between two
        arrays of the image's full size, of a quarter of a gigabyte each for the largest.
        """
        processor = self._processor
        size = _resized_size(image.size, {key: side for key, side in dict(processor.size).items() if side})
        is_known = type(processor).__name__.startswith(PLAIN_PROCESSORS) and isinstance(processor.resample, int)
        if not (is_known and processor.do_resize and size):
            return processor(image, return_tensors="pt")["pixel_values"]
        resized = image.resize(size, Image.Resampling(processor.resample))
        return processor(resized, do_resize=False, return_tensors="pt")["pixel_values"]

    def picture(self, image: VisualInput) -> Image.Image:
        """The RGB picture [image_size, image_size] that the pixel values show the tower."""
        return picture_of(image.views[0], self._processor)


def _resized_size(size: tuple[int, int], settings: Mapping[str, int]) -> tuple[int, int] | None:
    """Width and height as transformers computes them; None for settings other than a short side, or both sides."""
    if set(settings) == {"height", "width"}:
        return settings["width"], settings["height"]
    if set(settings) != {"shortest_edge"}:
        return None
    short = settings["shortest_edge"]
    long = int(short * max(size) / min(size))
    return (short, long) if size[0] <= size[1] else (long, short)
