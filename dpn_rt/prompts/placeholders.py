"""Where the images of a prompt go: token ids as users or tokenizers write them -> one placeholder id per image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from dpn_rt.errors import ImageError
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID
from dpn_rt.prompts.markers import IMAGE_TEXT


def place_images(ids: Sequence[int], image_token_id: int | None, num_rows: Sequence[int]) -> list[int]:
    """Ids with one placeholder (-200) per image.

    The tokenizer's image token may stand there once per image or, as transformers' processors write it, once per row.

    Args:
        ids: of the prompt.
        image_token_id: the tokenizer's image token; None where it has none.
        num_rows: of each image.

    Raises:
        ImageError: the prompt has more or fewer placeholders than there are images.
    """
    num_images = len(num_rows)
    markers = {IMAGE_PLACEHOLDER_ID, image_token_id}
    if sum(token_id in markers for token_id in ids) == num_images:
        return [IMAGE_PLACEHOLDER_ID if token_id in markers else token_id for token_id in ids]
    result: list[int] = []
    image = 0  # the next one that has no place yet
    for token_id, group in groupby(ids):
        length = len(list(group))
        if token_id == image_token_id:
            count = _num_images_of_run(length, num_rows[image:])
        else:
            count = length if token_id == IMAGE_PLACEHOLDER_ID else 0
        result += [IMAGE_PLACEHOLDER_ID] * count or [token_id] * length
        image += count
    _check_num_placeholders(image, num_images)
    return result


def _num_images_of_run(length: int, num_rows: Sequence[int]) -> int:
    """How many images a run of the tokenizer's image token stands for, the first of `num_rows`."""
    if length == 1 or not num_rows:
        return 1
    rows = count = 0
    while rows < length and count < len(num_rows):
        rows, count = rows + num_rows[count], count + 1
    if rows != length:
        raise ImageError(
            f"the prompt repeats the image token {length} times: expected it once, "
            f"or once per visual token ({num_rows[0]})"
        )
    return count


def _check_num_placeholders(num_placeholders: int, num_images: int) -> None:
    if num_placeholders == num_images:
        return
    if not num_placeholders:
        raise ImageError(
            f"an image was given, but the prompt has no placeholder: expected {IMAGE_TEXT} in the text, "
            f"or the id {IMAGE_PLACEHOLDER_ID}"
        )
    if not num_images:
        raise ImageError(
            "the prompt has an image placeholder, but no image was given: "
            'expected "multi_modal_data" with "image" or "image_embeds", or a message of a chat that has it'
        )
    raise ImageError(f"the prompt has {num_placeholders} image placeholders for {num_images} images: expected one each")
