"""Images -> pixel values of the vision tower, through transformers' own image processor."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dpn_rt.errors import EngineError, ImageError
from dpn_rt.format.config import AspectRatio
from dpn_rt.model.vision.clip import ClipConfig
from dpn_rt.prompts.image import MAX_PIXELS, pad_to_square


class ImageProcessor:
    """Resizes, crops and normalises as the checkpoint's `preprocessor_config.json` says."""

    def __init__(
        self, directory: Path, vision: ClipConfig, aspect_ratio: AspectRatio, max_pixels: int = MAX_PIXELS
    ) -> None:
        """
        Args:
            directory: holds `preprocessor_config.json` (or `processor_config.json`).
            vision: the tower, for the size that must come out.
            aspect_ratio: "pad" makes the image square first.
            max_pixels: bound of every intermediate image.

        Raises:
            EngineError: the image processor cannot be loaded.
        """
        self._side = vision.image_size
        self._pad = aspect_ratio == "pad"
        self._max_pixels = max_pixels
        try:
            self._processor = _load(directory)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError and ImportError here
            raise EngineError(f"{directory}: cannot load the image processor: {error}") from error

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixel values [3, image_size, image_size] float32 of an RGB image.

        Raises:
            ImageError: the image is too elongated, or comes out with another size than the tower's.
        """
        if self._pad:
            image = pad_to_square(image, self._max_pixels)
        width, height = image.size
        # CLIP scales the short side to its input: a very long image would grow without bound on the way.
        scaled = self._side**2 * max(width, height) // min(width, height)
        if scaled > self._max_pixels:
            raise ImageError(
                f"image of {width} x {height}: scaled to a short side of {self._side} it has {scaled} pixels, "
                f"expected at most {self._max_pixels}"
            )
        pixels = torch.as_tensor(self._processor(image, return_tensors="pt")["pixel_values"])[0]
        expected = (3, self._side, self._side)
        if tuple(pixels.shape) != expected:
            raise ImageError(
                f"image of {width} x {height}: the image processor gave pixel values {list(pixels.shape)}, "
                f"the vision tower takes {list(expected)}"
            )
        return pixels.to(torch.float32).contiguous()

    def picture(self, pixels: Tensor) -> Image.Image:
        """The RGB picture [image_size, image_size] that pixel values [3, image_size, image_size] show the tower."""
        settings = self._processor
        if settings.do_normalize:
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.image_mean, settings.image_std))
            pixels = pixels * std + mean
        if settings.do_rescale:
            pixels = pixels / settings.rescale_factor
        return Image.fromarray(pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy(), "RGB")


def _load(directory: Path) -> Any:
    """The processor that works on PIL and numpy; the one on torchvision needs a package that may be missing."""
    from transformers import AutoImageProcessor

    # The keyword's name changed within transformers 5, together with this module.
    has_backends = find_spec("transformers.image_processing_backends") is not None
    choice: dict[str, Any] = {"backend": "pil"} if has_backends else {"use_fast": False}
    loader: Any = AutoImageProcessor
    return loader.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **choice)
