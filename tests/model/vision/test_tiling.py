"""The rows of images in tiles: as many as transformers' processors count, and newlines where lines end."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from dpn_rt.errors import ImageError
from dpn_rt.model.reduction.grid import num_visual
from dpn_rt.model.reduction.newlines import newlines_among, rows_of, tokens_of, visual_rows
from dpn_rt.model.reduction.pool import Pool
from dpn_rt.model.reduction.segment_pool import first_tokens
from dpn_rt.model.vision.anyres.config import AnyresConfig
from dpn_rt.model.vision.anyres.tiling import tiling_of
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.siglip.config import SiglipConfig
from dpn_rt.model.vision.visual_input import Tiling, VisualInput

CLIP = ClipConfig(1024, 4096, 23, 16, 336, 14, 1e-5, "quick_gelu", "patch")
SIGLIP = SiglipConfig(1152, 4304, 26, 16, 384, 14, 1e-6, "gelu_tanh", "patch")
NEXT = AnyresConfig(CLIP, ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), None, "tiled")
SIDES = range(384, 2305, 384)
ONEVISION = AnyresConfig(SIGLIP, tuple(itertools.product(SIDES, SIDES)), 9, "whole")
SIZES = st.tuples(st.integers(30, 3000), st.integers(30, 3000))


def resolution_of(config: AnyresConfig, size: tuple[int, int]) -> tuple[int, int]:
    height, width = select_best_resolution(size, [list(each) for each in config.resolutions])
    return height, width


def tiling(config: AnyresConfig, size: tuple[int, int]) -> Tiling:
    return tiling_of(size, resolution_of(config, size), config.tower.image_size, config.tower.grid)


def counted_by_transformers(config: AnyresConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Visual tokens and newlines of the tiles."""
    processor: Any = LlavaNextProcessor if config.max_tiles is None else LlavaOnevisionProcessor
    counter = processor.__new__(processor)
    counter.vision_aspect_ratio = f"anyres_max_{config.max_tiles}"
    rows, columns = config.tower.grid
    tiles = [side // config.tower.image_size for side in resolution_of(config, size)]
    visual, newlines = counter._get_unpadded_features(*size, rows, columns, *tiles)
    return visual, newlines


@pytest.mark.parametrize("config", [NEXT, ONEVISION], ids=["next", "onevision"])
@given(SIZES)
def test_as_many_rows_as_transformers_counts(config: AnyresConfig, size: tuple[int, int]) -> None:
    made = tiling(config, size)
    visual, newlines = counted_by_transformers(config, size)
    segments, rows = config.segments(made), config.newline_rows(made)
    assert (num_visual(segments[1:]), len(rows)) == (visual, newlines)
    assert num_visual(segments) + len(rows) <= config.max_visual_tokens


def test_sizes_of_published_models() -> None:
    assert NEXT.max_visual_tokens == 576 + 48 * 49
    assert (NEXT.max_crops, ONEVISION.max_crops) == (5, 37)
    square = tiling(NEXT, (1000, 1000))
    assert NEXT.segments(square) == ((24, 24), (48, 48))
    assert NEXT.newline_rows(square).tolist() == [576 + 49 * line + 48 for line in range(48)]
    assert NEXT.segments(None) == ((24, 24),) and NEXT.newline_rows(None).tolist() == [576]
    # 6 x 6 tiles of 27 x 27 have 26,244 tokens: scaled down to those of 9 tiles.
    assert ONEVISION.segments(tiling(ONEVISION, (2304, 2304))) == ((27, 27), (81, 81))


@given(st.integers(1, 40), st.data())
def test_numbers_of_tokens_and_rows(num_rows: int, data: st.DataObject) -> None:
    chosen = st.sets(st.integers(0, num_rows - 1)).map(sorted)
    newlines = np.array(data.draw(chosen), dtype=np.int32)
    visual = visual_rows(num_rows, newlines)
    assert sorted([*visual.tolist(), *newlines.tolist()]) == list(range(num_rows))
    some = st.lists(st.booleans(), min_size=len(visual), max_size=len(visual))
    tokens = np.flatnonzero(data.draw(some)).astype(np.int32)
    rows = rows_of(tokens, num_rows, newlines)
    assert set(rows.tolist()) == {*newlines.tolist(), *visual[tokens].tolist()}
    assert tokens_of(rows, newlines).tolist() == tokens.tolist()
    assert rows[newlines_among(rows, newlines)].tolist() == newlines.tolist()


SIDE = st.integers(1, 7)


@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 4))
def test_the_first_token_of_each_window(grids: list[tuple[int, int]], height: int, width: int) -> None:
    expected, start = [], 0
    for rows, columns in grids:
        fits = height <= rows and width <= columns
        step = (height, width) if fits else (1, 1)
        for row in range(0, rows - step[0] + 1, step[0]):
            expected += [start + row * columns + column for column in range(0, columns - step[1] + 1, step[1])]
        start += rows * columns
    assert first_tokens(tuple(grids), Pool((height, width))).tolist() == expected


@pytest.mark.parametrize(
    ("config", "views", "made"),
    [
        (NEXT, 5, None),  # no tiles
        (NEXT, 1, None),  # nor may there be none
        (NEXT, 10, Tiling((3, 3), (72, 72))),  # no such resolution
        (NEXT, 4, Tiling((2, 2), (48, 48))),  # one tile too few
        (ONEVISION, 2, Tiling((1, 1), (27, 27))),  # of another size, see below
    ],
)
def test_images_of_other_encoders_are_refused(config: AnyresConfig, views: int, made: Tiling | None) -> None:
    pixels = [torch.zeros(3, 336, 336)] * views
    image = VisualInput.of_crops(pixels, made, config.segments(made), config.newline_rows(made))
    with pytest.raises(ImageError, match="image: "):
        config.check_views(image)


def test_resolutions_are_made_of_tiles() -> None:
    config = AnyresConfig(CLIP, ((336, 500),), None, "tiled")
    assert list(config.problems(needs_grid=False)) == [
        "vision resolution 336 x 500: expected multiples of the tower's 336 pixels"
    ]
    assert list(AnyresConfig(CLIP, (), None, "tiled").problems(needs_grid=False)) == [
        "vision resolutions: expected at least one"
    ]
