"""Images to crops, through transformers' own image processor."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from dpn_rt.errors import EngineError, ImageError
from dpn_rt.model.vision.anyres.config import AnyresConfig
from dpn_rt.model.vision.anyres.tiling import tiling_of
from dpn_rt.model.vision.preprocessing import SETTINGS, load_image_processor, picture_of
from dpn_rt.model.vision.visual_input import VisualInput
from dpn_rt.schema.text import shown

_TINY = Image.new("RGB", (1, 1))


class AnyresPreprocessor:
    """A `Preprocessor`: an overview, and tiles of the resolution that fits the image best."""

    def __init__(self, directory: Path, config: AnyresConfig, *, max_pixels: int) -> None:
        """
        Args:
            directory: holds `preprocessor_config.json`.
            config: of the encoder, for the crops that must come out.
            max_pixels: bound of every intermediate image.

        Raises:
            EngineError: the image processor cannot be loaded, or makes other tiles than the encoder takes.
        """
        self._config, self._max_pixels = config, max_pixels
        self._processor = load_image_processor(directory)
        found = getattr(self._processor, "image_grid_pinpoints", None)
        if found is None or [tuple(each) for each in found] != list(config.resolutions):
            raise EngineError(
                f"{directory}: {SETTINGS} has image_grid_pinpoints={shown(found)}, expected the resolutions of "
                f"config.json, {shown(list(config.resolutions))}"
            )

    def __call__(self, image: Image.Image, num_images: int = 1) -> VisualInput:
        """The crops of an RGB image `[3, image_size, image_size]`, the overview first.

        Raises:
            ImageError: the image is too elongated, or the crops come out with another size than the tower's.
        """
        if num_images > 1 and self._config.several_images == "whole":
            return self._whole(image)
        from transformers.image_processing_utils import select_best_resolution  # takes seconds

        config, size = self._config, (image.height, image.width)
        resolution = select_best_resolution(size, [list(each) for each in config.resolutions])
        tiling = tiling_of(size, tuple(resolution), config.tower.image_size, config.tower.grid)
        segments = config.segments(tiling)
        if min(segments[1]) < 1:
            raise ImageError(
                f"image of {image.width} x {image.height}: too elongated, less than one row of visual tokens in "
                f"{tiling.tiles[0]} x {tiling.tiles[1]} tiles"
            )
        views = self._views(self._processor(image, return_tensors="pt")["pixel_values"][0], image)
        if len(views) != 1 + tiling.tiles[0] * tiling.tiles[1]:
            raise ImageError(
                f"image of {image.width} x {image.height}: the image processor made {len(views)} crops, expected an "
                f"overview and {tiling.tiles[0]} x {tiling.tiles[1]} tiles"
            )
        return VisualInput.of_crops(views, tiling, segments, config.newline_rows(tiling))

    def picture(self, image: VisualInput) -> Image.Image:
        """The RGB overview."""
        return picture_of(image.views[0], self._processor)

    def _whole(self, image: Image.Image) -> VisualInput:
        """One crop of the image, padded to a square: transformers tells by the list that there are several images."""
        side = max(image.size)
        if side * side > self._max_pixels:
            raise ImageError(
                f"image of {image.width} x {image.height}: {side * side} pixels when padded to a square, expected at "
                f"most {self._max_pixels}"
            )
        views = self._views(self._processor([[image, _TINY]], return_tensors="pt")["pixel_values"][0], image)
        return VisualInput.of_crops(views[:1], None, self._config.segments(None), self._config.newline_rows(None))

    def _views(self, pixels: object, image: Image.Image) -> list[torch.Tensor]:
        """The crops as float32 tensors of their own."""
        side = self._config.tower.image_size
        crops = torch.as_tensor(pixels, device="cpu")
        if tuple(crops.shape[1:]) != (3, side, side):
            raise ImageError(
                f"image of {image.width} x {image.height}: the image processor gave pixel values {list(crops.shape)}, "
                f"the vision tower takes crops of {[3, side, side]}"
            )
        return list(crops.to(torch.float32).contiguous().unbind(0))
