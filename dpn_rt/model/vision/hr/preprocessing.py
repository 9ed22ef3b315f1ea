"""Images to LLaVA-HR's pixel values. The steps belong to the model, so no file of settings is read."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from dpn_rt.errors import ImageError
from dpn_rt.model.vision.hr.config import HrConfig
from dpn_rt.model.vision.preprocessing import pad_to_square
from dpn_rt.model.vision.visual_input import VisualInput

MEAN = np.array((0.48145466, 0.4578275, 0.40821073), dtype=np.float32)
STD = np.array((0.26862954, 0.26130258, 0.27577711), dtype=np.float32)
"""Of CLIP's training images, by colour."""


class HrPreprocessor:
    """A `Preprocessor`: shortest edge to the tower's size by PIL's bicubic filter, centre crop, CLIP's normalisation.

    The fast path's smaller input is made of these pixels by the encoder.
    """

    def __init__(self, config: HrConfig, *, pads: bool, max_pixels: int) -> None:
        """
        Args:
            config: of the tower, for the size that must come out.
            pads: pad images to a square first.
            max_pixels: bound of every intermediate image.
        """
        self._config, self._pads, self._max_pixels = config, pads, max_pixels

    def __call__(self, image: Image.Image, num_images: int = 1) -> VisualInput:
        """One view `[3, image_size, image_size]` of an RGB image.

        Raises:
            ImageError: the image is too elongated.
        """
        if self._pads:
            image = pad_to_square(image, self._max_pixels)
        pixels = np.asarray(self._square(image), dtype=np.float32) / np.float32(255)
        pixels = (pixels - MEAN) / STD
        view = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return VisualInput.of_views((view,), self._config.grid, self._config.num_visual_tokens)

    def picture(self, image: VisualInput) -> Image.Image:
        """The RGB picture [image_size, image_size] that the pixel values show the tower."""
        (view,) = image.views
        pixels = (view.numpy().transpose(1, 2, 0) * STD + MEAN) * 255
        return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8), "RGB")

    def _square(self, image: Image.Image) -> Image.Image:
        """Scaled and cropped to `image_size` pixels per side."""
        width, height = image.size
        side, short, long = self._config.image_size, min(width, height), max(width, height)
        longest = int(side * long / short)
        if side * longest > self._max_pixels:
            raise ImageError(
                f"image of {width} x {height}: scaled to a short side of {side} it has {side * longest} pixels, "
                f"expected at most {self._max_pixels}"
            )
        size = (side, longest) if width <= height else (longest, side)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        return image.crop((left, top, left + side, top + side))
