from __future__ import annotations

import numpy as np
from PIL import Image

from dpn_rt.drawing import CAPTION_HEIGHT, GAP, draw_pyramid, patches_per_token
from dpn_rt.outputs import Pyramid

PYRAMID = Pyramid(
    experts=[2, None, 1],
    kernels=[(2, 2), None, (1, 2)],
    probs=[[0.2, 0.3, 0.5], None, [0.1, 0.8, 0.1]],
    visual_tokens=[25, 4, 4, 2],
    kv_lengths=[30, 9, 9, 7],
    grids=[(5, 5), (2, 2), (2, 2), (2, 1)],
)


def test_patches_grow_where_a_boundary_pooled() -> None:
    assert patches_per_token(PYRAMID) == [(1, 1), (2, 2), (2, 2), (2, 4)]


def test_one_panel_per_stage_with_dropped_patches_shaded() -> None:
    side = 100
    sheet = draw_pyramid(Image.new("RGB", (50, 50), (0, 200, 0)), PYRAMID, side)
    assert sheet.size == (4 * side + 3 * GAP, side + CAPTION_HEIGHT)
    pixels = np.asarray(sheet)

    def colour(stage: int, x: int, y: int) -> tuple[int, ...]:
        return tuple(int(value) for value in pixels[CAPTION_HEIGHT + y, stage * (side + GAP) + x])

    assert colour(0, 90, 90) == (0, 200, 0)  # the fifth row and column of patches is still drawn
    assert colour(1, 90, 50)[1] < 120  # and is dropped after a 2x2 kernel
    assert colour(1, 40, 10) == (255, 255, 255)  # the line between two merged patches
    assert colour(0, 10, 10) == (0, 200, 0)
    assert colour(3, 40, 10) == (0, 200, 0)  # one patch of four columns: no line there


def test_text_alone_draws_nothing() -> None:
    empty = Pyramid([None], [None], [None], [0, 0], [5, 5], [None, None])
    assert np.asarray(draw_pyramid(Image.new("RGB", (9, 9)), empty, 20)).min() == 255
