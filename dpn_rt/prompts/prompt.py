"""The forms of a prompt -> one form."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dpn_rt.errors import ImageError, RequestError
from dpn_rt.schema.text import check_unicode, shown

Prompt = str | Mapping[str, Any]
"""A string, or a mapping with "prompt" or "prompt_token_ids", and optionally images and a forced route. Where both are
given, the ids count, and the text is what is shown."""

_KEYS = ("prompt", "prompt_token_ids", "multi_modal_data", "image_grid", "route", "router_bias", "reduce", "kept")
_IMAGE_KEYS = ("image", "image_embeds", "image_grid")
MAX_IMAGES = 16
"""Of one prompt, unless `limit_mm_per_prompt` says otherwise."""


@dataclass(frozen=True)
class PromptParts:
    """The parts of a prompt. Their values are not checked yet."""

    text: str | None
    token_ids: tuple[int, ...] | None
    images: tuple[Any, ...]
    image_embeds: tuple[Any, ...]
    """Empty where there are images."""
    image_grids: tuple[Any, ...]
    """Of each image or embedding; None where it was not given."""
    route: Any | None
    router_bias: Any | None
    reduce: Any | None
    kept: Any | None


def take_apart(prompt: Prompt) -> PromptParts:
    """The parts of a prompt.

    Raises:
        RequestError: there is neither text nor ids, the prompt is empty, or a key is unknown.
        ImageError: there are images and embeddings, an empty list of them, or another number of grids.
    """
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    if not isinstance(prompt, Mapping):
        raise RequestError(f"prompt: expected a string or a dict, got {type(prompt).__name__}")
    _check_keys("prompt", prompt, _KEYS)
    media = _get(prompt, "multi_modal_data", {})
    if not isinstance(media, Mapping):
        raise RequestError(f'multi_modal_data: expected a dict such as {{"image": ...}}, got {type(media).__name__}')
    _check_keys("multi_modal_data", media, _IMAGE_KEYS)
    text, ids = _get(prompt, "prompt"), _get(prompt, "prompt_token_ids")
    if text is None and ids is None:
        raise RequestError(f'prompt: expected one of "prompt" and "prompt_token_ids", got keys {shown(list(prompt))}')
    if text is not None and not isinstance(text, str):
        raise RequestError(f"prompt: expected a string, got {type(text).__name__}")
    check_unicode(text or "", "prompt", field="prompt")
    token_ids = None if ids is None else _token_ids(ids)
    if not text and not token_ids:
        raise RequestError("prompt is empty: expected at least one token")
    images, embeds = _items("image", _get(media, "image")), _items("image_embeds", _get(media, "image_embeds"))
    if images and embeds:
        raise ImageError("multi_modal_data has both image and image_embeds: expected one of them")
    grids = _grids(_get(media, "image_grid", _get(prompt, "image_grid")), len(images) + len(embeds))
    asked = (_get(prompt, key) for key in ("route", "router_bias", "reduce", "kept"))
    return PromptParts(text, token_ids, images, embeds, grids, *asked)


def check_num_images(num_images: int, max_images: int, found: str) -> None:
    """Refuses a prompt with too many images, however they are given.

    Args:
        num_images: how many images, or placeholders of images, the prompt has.
        max_images: how many it may have.
        found: what the prompt has, for the message.

    Raises:
        ImageError: there are more than `max_images`.
    """
    if num_images > max_images:
        raise ImageError(f"{found}: expected at most {max_images} per prompt (limit_mm_per_prompt)")


def _get(mapping: Mapping[str, Any], key: str, default: Any = None) -> Any:
    value = mapping.get(key)
    return default if value is None else value


def _check_keys(name: str, mapping: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = [key for key in mapping if key not in known]
    if unknown:
        raise RequestError(f"{name}: unknown keys {shown(unknown)}, expected some of {list(known)}")


def _items(name: str, value: Any) -> tuple[Any, ...]:
    """The items of a list; any other value is one item."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        return (value,)
    if not value:
        raise ImageError(f"{name}: got an empty list, expected an image, or none at all")
    return tuple(value)


def _grids(value: Any, num_images: int) -> tuple[Any, ...]:
    """A grid for each image: a list of as many, or for a single image the grid itself."""
    if value is None:
        return (None,) * num_images
    if num_images <= 1:
        is_list_of_grids = isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], list | tuple)
        return (value[0] if is_list_of_grids else value,)[:num_images]
    if not isinstance(value, list | tuple) or len(value) != num_images:
        raise ImageError(f"image_grid={shown(value)}: expected a list of {num_images} grids, one per image")
    return tuple(value)


def _token_ids(ids: Any) -> tuple[int, ...]:
    if isinstance(ids, torch.Tensor | np.ndarray):
        ids = ids.tolist()
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
        raise RequestError(f"prompt_token_ids: expected a list of integers, got {type(ids).__name__}")
    result = []
    for position, token_id in enumerate(ids):
        try:
            if isinstance(token_id, bool):
                raise TypeError
            result.append(operator.index(token_id))
        except TypeError:
            raise RequestError(f"prompt_token_ids[{position}]={shown(token_id)}: expected an integer") from None
    return tuple(result)
