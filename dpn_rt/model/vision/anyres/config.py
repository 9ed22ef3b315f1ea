"""Images in tiles as a configuration: the tower that sees each crop, and which tilings there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from dpn_rt.errors import ImageError
from dpn_rt.model.layer_pair import LayerPair
from dpn_rt.model.ranks import RankGroup
from dpn_rt.model.reduction.grid import Grid, IntArray, Segments, num_visual
from dpn_rt.model.vision.anyres.tiling import MUCH_LARGER, newline_rows, tiled_segments
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.encoder import CropEncoder
from dpn_rt.model.vision.preprocessing import Preprocessor
from dpn_rt.model.vision.projector import Projector
from dpn_rt.model.vision.siglip.config import SiglipConfig
from dpn_rt.model.vision.visual_input import Tiling, ViewShape, VisualInput, check_view_shapes
from dpn_rt.schema.bounds import FEW, Count, Side
from dpn_rt.schema.weights import NamedSpecs

SeveralImages = Literal["tiled", "whole"]


@dataclass(frozen=True)
class AnyresConfig:
    """An overview and tiles of each image, all through one tower. A `VisionEncoderConfig`."""

    tower: ClipConfig | SiglipConfig
    resolutions: Annotated[tuple[tuple[Side, Side], ...], FEW]
    """Height and width in pixels of all tiles together: an image takes the one that fits it best."""
    max_tiles: Count | None
    """The tiles of one image have about as many visual tokens as so many whole ones, at most; None: any number."""
    several_images: SeveralImages
    """Of a prompt with more than one image: each in tiles, or each as one crop, padded to a square."""
    type: Literal["anyres"] = "anyres"

    @property
    def summary(self) -> str:
        height, width = max(self.resolutions, key=lambda each: each[0] * each[1])
        return f"images of up to {width} x {height} pixels in tiles of {self.tower.image_size}"

    @property
    def hidden_size(self) -> int:
        return self.tower.hidden_size

    @property
    def grid(self) -> None:
        """It depends on the image."""

    @property
    def max_visual_tokens(self) -> int:
        """Rows of an image, newlines included."""
        overview = num_visual((self.tower.grid,))
        most = 0
        for tiles in self.tilings:
            grid = self.covered(tiles)
            tokens = num_visual((grid,))
            if self.max_tiles is not None:
                tokens = min(tokens, int(MUCH_LARGER**2 * self.max_tiles * overview))
            most = max(most, overview + tokens + grid[0])
        return most

    @property
    def tilings(self) -> list[Grid]:
        """Rows and columns of tiles of each resolution."""
        side = self.tower.image_size
        return [(height // side, width // side) for height, width in self.resolutions]

    @property
    def max_crops(self) -> int:
        """Crops of one image, at most."""
        return 1 + max(rows * columns for rows, columns in self.tilings)

    @property
    def view_shapes(self) -> tuple[ViewShape, ...]:
        """The pixel values of a crop."""
        return self.tower.view_shapes

    @property
    def head_dims(self) -> tuple[int, ...]:
        return self.tower.head_dims

    @property
    def flops_per_crop(self) -> int:
        return self.tower.flops_per_crop

    def covered(self, tiles: Grid) -> Grid:
        """Rows and columns of visual tokens of so many tiles."""
        height, width = self.tower.grid
        return tiles[0] * height, tiles[1] * width

    def segments(self, tiling: Tiling | None) -> Segments:
        """Grids of an image's visual tokens; of one without tiles the overview's alone."""
        if tiling is None:
            return (self.tower.grid,)
        return tiled_segments(tiling, self.tower.grid, self.max_tiles)

    def newline_rows(self, tiling: Tiling | None) -> IntArray:
        """`[num_newlines]` ascending rows of an image that are newlines."""
        return newline_rows(self.segments(tiling))

    def weight_specs(self, dtype: torch.dtype) -> NamedSpecs:
        """The tower's; the newline row is the projector's."""
        return self.tower.weight_specs(dtype)

    def layer_pairs(self) -> Iterator[LayerPair]:
        """The tower's."""
        return self.tower.layer_pairs()

    def problems(self, *, needs_grid: bool) -> Iterator[str]:
        """Of the tower, or resolutions that are not made of its tiles."""
        yield from self.tower.problems(needs_grid=True)
        side = self.tower.image_size
        if not self.resolutions:
            yield "vision resolutions: expected at least one"
        for height, width in self.resolutions:
            if height % side or width % side:
                yield f"vision resolution {height} x {width}: expected multiples of the tower's {side} pixels"

    def check_views(self, image: VisualInput) -> None:
        """Refuse an image that was made for another tower, or in other tiles."""
        tiling = image.tiling
        count = 1 if tiling is None else 1 + tiling.tiles[0] * tiling.tiles[1]
        check_view_shapes(image, self.view_shapes * count)
        known = self.several_images == "whole" if tiling is None else tiling.tiles in self.tilings
        given, newlines = image.given.segments, self.newline_rows(tiling)
        if not known or given != self.segments(tiling) or not np.array_equal(image.source_newlines, newlines):
            tiles = "no tiles" if tiling is None else f"{tiling.tiles[0]} x {tiling.tiles[1]} tiles"
            raise ImageError(f"image: {tiles} with visual tokens on the grids {given}, expected those of this encoder")

    def preprocessor(self, directory: Path | None, *, pads: bool, max_pixels: int) -> Preprocessor | None:
        """Through transformers' image processor, whose settings are in `directory`."""
        from dpn_rt.model.vision.anyres.preprocessing import AnyresPreprocessor  # which imports this module

        return None if directory is None else AnyresPreprocessor(directory, self, max_pixels=max_pixels)

    def load(
        self, weights: Mapping[str, Tensor], projector: Projector, *, prepack: bool, group: RankGroup | None = None
    ) -> CropEncoder:
        """Tower and projector; takes `vision.*`."""
        from dpn_rt.model.vision.anyres.encoder import AnyresEncoder  # which imports this module

        return AnyresEncoder(self, self.tower.load(weights, projector, prepack=prepack, group=group), projector)
