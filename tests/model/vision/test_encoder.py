"""For any encoder: images are cut into crops, crops are encoded a few at a time, and their rows are joined again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dpn_rt.model.vision.encoder import CropEncoder, EncodedImage, ImageEncoder, load_encoder
from dpn_rt.model.vision.visual_input import VisualInput
from tests.engine.models import MODEL

SHAPES = ((3, 4, 4), (1, 2))


class TilesConfig:
    """Configuration of an encoder with one crop per tile of the image and two views per crop."""

    view_shapes = SHAPES

    def check_views(self, image: VisualInput) -> None:
        assert image.views


class TilesEncoder:
    """A tile has one row: the sums of its views. An image has a row per tile, in reverse order."""

    crops_per_call = 3

    def __init__(self) -> None:
        self.config = cast(Any, TilesConfig())
        self.calls: list[int] = []

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        assert [tuple(view.shape[1:]) for view in views] == list(SHAPES)
        self.calls.append(len(views[0]))
        return torch.stack([view.flatten(1).sum(1) for view in views], dim=1)[:, None]

    def assemble(self, image: VisualInput, crops: Sequence[Tensor]) -> EncodedImage:
        return EncodedImage(torch.cat(list(crops)[::-1]), (1, len(crops)))


def tiled(num_tiles: int) -> VisualInput:
    views = [torch.randn(shape) for _ in range(num_tiles) for shape in SHAPES]
    return VisualInput.of_views(views, (1, num_tiles), num_tiles)


@pytest.mark.parametrize("tiles", [[], [1], [4], [1, 2, 5, 1], [3, 3]])
def test_crops_of_all_images_are_computed_together(tiles: list[int]) -> None:
    encoder = TilesEncoder()
    images = [tiled(count) for count in tiles]
    encoded = ImageEncoder(cast(CropEncoder, encoder)).encode(images)
    total = sum(tiles)
    assert encoder.calls == [3] * (total // 3) + ([total % 3] if total % 3 else [])
    assert [image.grid for image in encoded] == [(1, count) for count in tiles]
    for image, result in zip(images, encoded, strict=True):
        sums = torch.tensor([float(view.sum()) for view in image.views]).view(-1, 2)
        torch.testing.assert_close(result.rows, sums.flip(0))


def test_an_encoder_keeps_what_its_preprocessor_said() -> None:
    image = VisualInput.of_views(tiled(2).views, (2, 2), 4)
    with pytest.raises(AssertionError, match="but the preprocessor said"):
        ImageEncoder(cast(CropEncoder, TilesEncoder())).encode([image])


def test_an_engine_without_a_tower_has_no_encoder() -> None:
    assert load_encoder(None, MODEL.projector, {}, prepack=False) is None
    assert load_encoder(MODEL.vision, None, {}, prepack=False) is None
