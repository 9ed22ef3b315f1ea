"""Several images of a prompt, and the tokens that stand for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpn_rt.errors import ImageError, RequestError
from dpn_rt.prompts.placeholders import place_images
from dpn_rt.prompts.processor import Processor
from tests.prompts.models import embeds, make_model


@pytest.fixture(scope="module")
def several() -> Processor:
    """As `bare`, for up to three images."""
    return Processor(None, make_model(vision=False, router_id=199), max_images=3)


def test_several_images_go_to_their_placeholders_in_order(several: Processor) -> None:
    given = [embeds(6), embeds(1), embeds(9)]
    ids = [1, -200, 5, -200, -200, 199, 7, 199]
    media = {"image_embeds": given, "image_grid": [(2, 3), (1, 1), (3, 3)]}
    result = several.process({"prompt_token_ids": ids, "multi_modal_data": media})
    assert result.image_starts == (1, 8, 9) and result.grids == ((2, 3), (1, 1), (3, 3))
    assert (result.num_rows, result.num_visual_tokens, result.num_text_rows) == (21, 16, 5)
    assert result.router_rows.tolist() == [18, 20]
    assert result.row_token_ids.tolist() == [1, *[-200] * 6, 5, *[-200] * 10, 199, 7, 199]
    for image, rows in zip(result.images, given, strict=True):
        assert image.embeds is not None and torch.equal(image.embeds, rows)


@pytest.mark.parametrize(
    ("ids", "count", "grids", "message"),
    [
        ([-200] * 4 + [199], 4, None, "4 image placeholders: expected at most 3 per prompt"),
        ([-200, 5, -200, 199], 1, None, "2 image placeholders for 1 images"),
        ([-200, 199], 2, None, "1 image placeholders for 2 images"),
        ([5, 199], 2, None, "no placeholder"),
        ([-200, -200, 199], 2, (2, 2), r"image_grid=\(2, 2\)|rows, columns"),
        ([-200, -200, 199], 2, [(2, 2)], "a list of 2 grids, one per image"),
        ([-200, -200, 199], 2, [(2, 2), (2, 3)], "for image_embeds of 4 rows"),
        ([-200, 199, -200, 5], 2, None, None),
        ([5, 199, -200, -200], 2, None, "before the image at 2"),
    ],
)
def test_bad_numbers_of_images(several: Processor, ids: list[int], count: int, grids: Any, message: str | None) -> None:
    prompt = {
        "prompt_token_ids": ids,
        "multi_modal_data": {"image_embeds": [embeds(4)] * count, **({"image_grid": grids} if grids else {})},
    }
    if message is None:
        assert several.process(prompt).image_starts == (0, 5)
        return
    with pytest.raises((ImageError, RequestError), match=message):
        several.process(prompt)


@pytest.mark.parametrize(
    ("ids", "placed"),
    [
        ([1, 9, 5, 9], [1, -200, 5, -200]),
        ([9, 9], [-200, -200]),
        ([9] * 5 + [1], [-200, -200, 1]),
        ([9, 9, 1, 9, 9, 9], [-200, 1, -200]),
        ([9, 1, 9, 9, 9], [-200, 1, -200]),
        ([-200, 1, 9, 9, 9], [-200, 1, -200]),
        ([-200, -200], [-200, -200]),
    ],
)
def test_image_tokens_stand_once_per_image_or_once_per_row(ids: list[int], placed: list[int]) -> None:
    assert place_images(ids, 9, [2, 3]) == placed


@pytest.mark.parametrize("ids", [[9] * 4, [9] * 6, [1, 9, 9, 9], [9, 9], [1], [-200] * 3, [9, 1, 9, 1, 9]])
def test_image_tokens_that_fit_no_images(ids: list[int]) -> None:
    with pytest.raises(ImageError, match=r"repeats the image token|placeholder"):
        place_images(ids, 9, [2, 3] if ids != [9, 9] else [3])
