from __future__ import annotations

import numpy as np
from PIL import Image

from dpn_rt.drawing import (
    CAPTION_HEIGHT,
    GAP,
    LINE_HEIGHT,
    MARGIN,
    MAX_LINES,
    _caption,
    draw_pyramid,
    patches_per_token,
)
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
    assert sheet.size == (4 * side + 3 * GAP, side + CAPTION_HEIGHT)  # without question and answer
    pixels = np.asarray(sheet)

    def colour(stage: int, x: int, y: int) -> tuple[int, ...]:
        return tuple(int(value) for value in pixels[CAPTION_HEIGHT + y, stage * (side + GAP) + x])

    assert colour(0, 90, 90) == (0, 200, 0)  # the fifth row and column of patches is still drawn
    assert colour(1, 90, 50)[1] < 120  # and is dropped after a 2x2 kernel
    assert colour(1, 40, 10) == (255, 255, 255)  # the line between two merged patches
    assert colour(0, 10, 10) == (0, 200, 0)
    assert colour(3, 40, 10) == (0, 200, 0)  # one patch of four columns: no line there


def test_question_and_answer_stand_above_the_panels() -> None:
    image = Image.new("RGB", (50, 50), (0, 200, 0))
    bare = np.asarray(draw_pyramid(image, PYRAMID, 100))
    for texts, num_lines in (
        ({"question": "What is it?"}, 1),
        ({"question": "What is it?", "answer": " A\nboat. "}, 2),
        ({"question": "word " * 500, "answer": "W" * 5000}, 2 * MAX_LINES),
        ({"question": " \n"}, 0),
    ):
        sheet = np.asarray(draw_pyramid(image, PYRAMID, 100, **texts))
        top = sheet.shape[0] - bare.shape[0]
        assert top == num_lines * LINE_HEIGHT + (2 * MARGIN if num_lines else 0)
        assert np.array_equal(sheet[top:], bare)
        for line in range(num_lines):
            start = MARGIN + line * LINE_HEIGHT
            assert sheet[start : start + LINE_HEIGHT, :-MARGIN].min() < 100, "every line is written"
            assert sheet[start : start + LINE_HEIGHT, -MARGIN:].min() == 255, "and none is cut off"


def test_captions_name_the_kernels() -> None:
    captions = [_caption(PYRAMID, stage) for stage in range(4)]
    assert captions == [
        "stage 0: 25 visual tokens",
        "stage 1, 2x2: 4 visual tokens",
        "stage 2, skipped: 4 visual tokens",
        "stage 3, 1x2: 2 visual tokens",
    ]
    for side in (336, 224, 130):
        image = Image.new("RGB", (50, 50), (0, 200, 0))
        between = np.asarray(draw_pyramid(image, PYRAMID, side))[:CAPTION_HEIGHT, side : side + GAP]
        assert between.min() == 255, "captions end where their panels end"


def test_text_alone_draws_nothing() -> None:
    empty = Pyramid([None], [None], [None], [0, 0], [5, 5], [None, None])
    assert np.asarray(draw_pyramid(Image.new("RGB", (9, 9)), empty, 20)).min() == 255
