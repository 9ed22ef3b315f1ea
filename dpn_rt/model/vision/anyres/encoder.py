"""The forward pass of images in tiles: crops through the tower, and their rows to those of the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt.model.reduction.grid import as_grid
from dpn_rt.model.vision.anyres.config import AnyresConfig
from dpn_rt.model.vision.encoder import CropEncoder, EncodedImage
from dpn_rt.model.vision.projector import Projector
from dpn_rt.model.vision.visual_input import Tiling, VisualInput


class AnyresEncoder:
    """A `CropEncoder`: the tower's, with several crops per image."""

    def __init__(self, config: AnyresConfig, tower: CropEncoder, projector: Projector) -> None:
        """
        Args:
            config: of the encoder.
            tower: with projector.
            projector: whose newline row ends the lines of tiles.
        """
        assert projector.newline is not None, "a model with images in tiles has a newline row"
        self.config = config
        self._tower, self._newline = tower, projector.newline

    @property
    def crops_per_call(self) -> int:
        return self._tower.crops_per_call

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """`[num_crops, 3, image_size, image_size]` -> `[num_crops, rows_per_crop, hidden_size]`."""
        return self._tower.forward(views)

    def assemble(self, image: VisualInput, crops: Sequence[Tensor]) -> EncodedImage:
        """The overview's rows, and those of the tiles line by line, each with a newline row at its end."""
        overview, tiling = crops[0], image.tiling
        segments = self.config.segments(tiling)
        if tiling is None:
            rows = torch.cat((overview, self._newline[None]))
        else:
            lines = self._on_grid(crops[1:], tiling, segments[1])
            newlines = self._newline.expand(len(lines), 1, -1)
            rows = torch.cat((overview, torch.cat((lines, newlines), dim=1).flatten(0, 1)))
        return EncodedImage(rows, as_grid(segments))

    def _on_grid(self, crops: Sequence[Tensor], tiling: Tiling, grid: tuple[int, int]) -> Tensor:
        """`[*grid, hidden_size]` rows of all tiles where they lie in the image, without padding."""
        (rows, columns), (height, width) = tiling.tiles, self.config.tower.grid
        tiles = torch.stack(list(crops)).view(rows, columns, height, width, -1)
        whole = tiles.transpose(1, 2).reshape(rows * height, columns * width, -1)
        top, left = ((side - inner) // 2 for side, inner in zip(whole.shape[:2], tiling.unpadded, strict=True))
        inner = whole[top : top + tiling.unpadded[0], left : left + tiling.unpadded[1]]
        if tiling.unpadded == grid:
            return inner
        scaled = functional.interpolate(inner.permute(2, 0, 1)[None], grid, mode="bilinear")
        return scaled[0].permute(1, 2, 0)
