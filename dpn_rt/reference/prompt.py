"""Checks one prompt, and finds the rows of its image and of its router tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dpn_rt.errors import ImageError, RequestError
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID, ModelConfig
from dpn_rt.model.reduction.grid import Grid
from dpn_rt.reference.trace import SampleLayout

Route = Sequence[int | None]
"""Expert per boundary to force; None leaves the choice to the router. A trace's `experts` is a route."""


def layout_prompt(config: ModelConfig, ids: Sequence[int], num_visual: int | None, grid: Grid | None) -> SampleLayout:
    """The layout of the first stage, after the image's rows have replaced the placeholder.

    Args:
        config: the model.
        ids: prompt token ids, the image as one id -200.
        num_visual: visual rows of the image, None without an image.
        grid: rows and columns of the visual rows; None: a square.

    Raises:
        RequestError: empty prompt, id out of range, `<ROUTER>` missing or before the image.
        ImageError: an image without a placeholder or the reverse, or a grid of another number of tokens.
    """
    vocab = config.decoder.vocab_size
    if not ids:
        raise RequestError("the prompt is empty; it needs at least one token id")
    for index, token in enumerate(ids):
        if token != IMAGE_PLACEHOLDER_ID and not 0 <= token < vocab:
            raise RequestError(f"token id {token} at index {index} is not in 0..{vocab - 1}")
    places = [index for index, token in enumerate(ids) if token == IMAGE_PLACEHOLDER_ID]
    if num_visual is None:
        if places:
            raise ImageError(f"the prompt has the image placeholder {IMAGE_PLACEHOLDER_ID} but no image was given")
        return SampleLayout(len(ids), 0, None, (len(ids) - 1,))
    if len(places) != 1:
        raise ImageError(
            f"one image was given, but the prompt has {len(places)} image placeholders ({IMAGE_PLACEHOLDER_ID}); "
            "one image per request is supported"
        )
    num_rows = len(ids) + num_visual - 1
    rows = _router_rows(config, ids, places[0], num_visual, num_rows)
    return SampleLayout(num_rows, places[0], _grid(config, num_visual, grid), rows)


def _grid(config: ModelConfig, num_visual: int, grid: Grid | None) -> Grid:
    if grid is None:
        side = math.isqrt(num_visual)
        if side * side == num_visual:
            return side, side
        if not config.reduction.layers:  # a dense model does not use the grid
            return 1, num_visual
        raise ImageError(f"{num_visual} visual tokens are not a square grid; give image_grid=(rows, columns)")
    if min(grid) < 1 or grid[0] * grid[1] != num_visual:
        raise ImageError(f"image_grid {grid} does not have {num_visual} cells, as the image embeddings have rows")
    return grid


def _router_rows(
    config: ModelConfig, ids: Sequence[int], image: int, num_visual: int, num_rows: int
) -> tuple[int, ...]:
    token = config.prompt.router_token_id
    if not (config.reduction.use_router_token and config.reduction.reads_router_rows):
        return (num_rows - 1,)
    if token is None:
        raise RequestError("the model routes on <ROUTER> tokens but names no router_token_id")
    places = [index for index, item in enumerate(ids) if item == token]
    if not places:
        raise RequestError(f"the prompt has an image but no <ROUTER> token (id {token}), which the routers read")
    if places[0] < image:
        raise RequestError(f"<ROUTER> (id {token}) at index {places[0]} stands before the image at index {image}")
    return tuple(place + num_visual - 1 for place in places)


def check_image_embeds(image_embeds: torch.Tensor, hidden_size: int) -> None:
    """Refuse rows that cannot be those of an image.

    Raises:
        ImageError: their shape is not [num_visual > 0, hidden_size], or a value is not finite.
    """
    if image_embeds.dim() != 2 or image_embeds.shape[1] != hidden_size or not len(image_embeds):
        shape = tuple(image_embeds.shape)
        raise ImageError(f"image_embeds: expected shape [num_visual > 0, {hidden_size}], got {shape}")
    if not bool(torch.isfinite(image_embeds).all()):
        raise ImageError("image_embeds: every value must be finite")


def check_route(config: ModelConfig, route: Route | None) -> None:
    """Refuse a route that does not fit the model.

    Raises:
        RequestError: there is not one entry per boundary, or an entry is not an expert of its boundary.
    """
    if route is None:
        return
    counts = list(config.reduction.num_experts)
    if len(route) != len(counts) or not all(e is None or 0 <= e < n for e, n in zip(route, counts, strict=False)):
        raise RequestError(f"route {list(route)}: expected one expert per boundary, each below {counts}")


def as_token_list(input_ids: torch.Tensor | Sequence[int]) -> list[int]:
    """Token ids of one sample, given as a list or as a tensor [num_ids] or [1, num_ids].

    Raises:
        RequestError: more than one sample.
    """
    if not isinstance(input_ids, torch.Tensor):
        return list(input_ids)
    if input_ids.dim() == 2 and input_ids.shape[0] == 1:
        input_ids = input_ids[0]
    if input_ids.dim() != 1:
        raise RequestError(f"input_ids: expected one sample [num_ids], got shape {tuple(input_ids.shape)}")
    return [int(token) for token in input_ids.tolist()]
