from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dpn_rt.drawing import (
    CAPTION_HEIGHT,
    GAP,
    LINE_HEIGHT,
    MARGIN,
    MAX_LINES,
    _caption,
    _heading,
    draw_pyramid,
    draw_pyramids,
    kept_tokens,
)
from dpn_rt.errors import ImageError
from dpn_rt.outputs import PrefillFlops, Pyramid, ReductionStep

PYRAMID = Pyramid(
    experts=[2, None, 1],
    kernels=[(2, 2), None, (1, 2)],
    probs=[[0.2, 0.3, 0.5], None, [0.1, 0.8, 0.1]],
    visual_tokens=[25, 4, 4, 2],
    kv_lengths=[30, 9, 9, 7],
    grids=[(5, 5), (2, 2), (2, 2), (2, 1)],
    image_grid=(5, 5),
    patches_per_token=[(1, 1), (2, 2), (2, 2), (2, 4)],
)
GREEN = (0, 200, 0)
POOL, FASTV = "pool:kernel=2x2,layer=0,function=avg", "fastv:k=2,ratio=0.5"
DROPS = "pyramiddrop:layers=2-3,ratios=0.5-0.25"


def ranked(
    steps: list[tuple[int, str]],
    kept: list[list[int] | list[list[int]] | None],
    visual_tokens: list[int],
    patches: list[tuple[int, int]],
    image_grid: tuple[int, int] = (4, 4),
) -> Pyramid:
    """Of a training-free reduction."""
    nothing: list[None] = [None] * (len(visual_tokens) - 1)
    return Pyramid(
        [*nothing],
        [*nothing],
        [*nothing],
        visual_tokens=visual_tokens,
        kv_lengths=[5 + count for count in visual_tokens],
        grids=[(1, count) for count in visual_tokens],
        kept=kept,
        steps=[ReductionStep(stage, spec) for stage, spec in steps],
        reduction="+".join(dict.fromkeys(spec for _, spec in steps)) or "none",
        image_grid=image_grid,
        patches_per_token=patches,
        flops=PrefillFlops(586, 1000, 0.414),
    )


def seen_cells(pyramid: Pyramid, stage: int, side: int = 120) -> list[tuple[int, int]]:
    """(row, column) of the patches that are as bright in a stage's panel as in the image."""
    pixels = np.asarray(draw_pyramid(Image.new("RGB", (50, 50), GREEN), pyramid, side))
    panel = pixels[-side:, stage * (side + GAP) : stage * (side + GAP) + side]
    assert pyramid.image_grid is not None
    height, width = (side // cells for cells in pyramid.image_grid)
    centres = panel[height // 2 :: height, width // 2 :: width]
    return [(int(row), int(column)) for row, column in np.argwhere(centres[..., 1] >= 200)]


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


def test_what_is_no_image_is_told() -> None:
    for other in ("photo.png", None, np.zeros((50, 50, 3), np.uint8)):
        with pytest.raises(ImageError, match=f"expected a PIL image, .*, got {type(other).__name__}$"):
            draw_pyramid(other, PYRAMID)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="side=0: expected at least 1 pixel"):
        draw_pyramid(Image.new("RGB", (50, 50)), PYRAMID, 0)


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


def test_dropped_tokens_are_dim_in_each_stage() -> None:
    """Also in stages of other requests' boundaries, where nothing more is dropped."""
    whole = [(row, column) for row in range(4) for column in range(4)]
    pyramid = ranked([(1, DROPS), (3, DROPS)], [[0, 5, 6, 15], [5]], [16, 4, 4, 1], [(1, 1)] * 4)
    assert seen_cells(pyramid, 0) == whole
    assert seen_cells(pyramid, 1) == seen_cells(pyramid, 2) == [(0, 0), (1, 1), (1, 2), (3, 3)]
    assert seen_cells(pyramid, 3) == [(1, 1)]
    assert seen_cells(ranked([], [], [16, 16], [(1, 1)] * 2), 1) == whole
    assert seen_cells(ranked([(0, "divprune:keep=0.1")], [[3, 8]], [2], [(1, 1)]), 0) == [(0, 3), (2, 0)]
    assert seen_cells(ranked([(1, "fastv:k=2,ratio=1")], [[]], [16, 0], [(1, 1)] * 2), 1) == []
    wide = ranked([(1, FASTV)], [[1, 7]], [12, 2], [(1, 1)] * 2, image_grid=(2, 6))
    assert seen_cells(wide, 1) == [(0, 1), (1, 1)]


def test_what_is_kept_of_a_pooled_grid() -> None:
    chain = ranked([(0, POOL), (2, FASTV)], [None, [1, 2]], [4, 4, 2], [(2, 2)] * 3, image_grid=(5, 5))
    left_over = {(4, column) for column in range(5)} | {(row, 4) for row in range(5)}
    assert set(seen_cells(chain, 0)) == {(row, column) for row in range(5) for column in range(5)} - left_over
    assert seen_cells(chain, 2) == [(0, 2), (0, 3), (1, 2), (1, 3), (2, 0), (2, 1), (3, 0), (3, 1)]
    late = ranked([(1, POOL), (2, FASTV)], [None, [3]], [16, 4, 1], [(1, 1), (2, 2), (2, 2)])
    assert len(seen_cells(late, 0)) == len(seen_cells(late, 1)) == 16
    assert seen_cells(late, 2) == [(2, 2), (2, 3), (3, 2), (3, 3)]


def test_of_several_images_the_first_is_drawn() -> None:
    pyramid = ranked([(1, FASTV)], [[[2, 3], [0, 1]]], [32, 4], [(1, 1)] * 2)
    assert kept_tokens(pyramid, 0) is None and kept_tokens(pyramid, 1) == [2, 3]
    assert kept_tokens(ranked([(1, FASTV)], [[[], []]], [32, 0], [(1, 1)] * 2), 1) == []
    assert kept_tokens(PYRAMID, 3) is None


def test_captions_name_the_reduction() -> None:
    chain = ranked([(0, POOL), (2, FASTV)], [None, [1]], [4, 4, 1], [(2, 2)] * 3)
    assert [_caption(chain, stage) for stage in range(3)] == [
        "stage 0, pool: 4 visual tokens",
        "stage 1: 4 visual tokens",
        "stage 2, fastv: 1 visual token",
    ]
    assert _heading(chain) == f"{POOL}+{FASTV} saves 41.4 % of the prefill's FLOPs"
    assert _heading(ranked([], [], [16, 16], [(1, 1)] * 2)) == "reduction: none"
    assert _heading(PYRAMID) == ""


def test_several_answers_stand_one_below_the_other() -> None:
    image = Image.new("RGB", (50, 50), GREEN)
    pyramids = [ranked([(1, FASTV)], [[2, 3]], [16, 2], [(1, 1)] * 2), ranked([], [], [16, 16], [(1, 1)] * 2)]
    sheet = draw_pyramids(image, [(pyramids[0], "A"), (pyramids[1], "B")], 100, "What?")
    first, second = draw_pyramid(image, pyramids[0], 100, "What?", "A"), draw_pyramid(image, pyramids[1], 100, "", "B")
    pixels = np.asarray(sheet)
    assert np.array_equal(pixels[: first.height], np.asarray(first))
    assert pixels[first.height : first.height + GAP].min() == 255
    assert np.array_equal(pixels[first.height + GAP :], np.asarray(second))


def test_text_alone_draws_nothing() -> None:
    empty = Pyramid([None], [None], [None], [0, 0], [5, 5], [None, None])
    assert np.asarray(draw_pyramid(Image.new("RGB", (9, 9)), empty, 20)).min() == 255
