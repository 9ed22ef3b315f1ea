"""The reduction that a request asks for: SPEC and kept rows -> checked configuration, and images as the decoder gets
them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpn_rt.errors import ConfigError, RequestError
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.reduction.chain import Chain
from dpn_rt.model.reduction.grid import IntArray, num_visual
from dpn_rt.model.reduction.pooling_config import PoolingConfig
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.model.reduction.spec import parse_spec
from dpn_rt.model.reduction.step import Cut
from dpn_rt.model.vision.visual_input import VisualInput
from dpn_rt.schema.text import shown

Kept = tuple[tuple[IntArray, ...], ...]


def checked_reduction(spec: Any, model: ModelConfig) -> Chain | NoReduction | None:
    """What a request asks for, or the engine's default.

    Returns:
        A chain; `NoReduction` where a trained model is to reduce nothing; None where it reduces as it was trained, or
        the model reduces nothing.

    Raises:
        RequestError: the SPEC is wrong, or the engine has no boundaries for it.
    """
    trained = isinstance(model.reduction, PoolingConfig)
    if spec is None:
        return model.reduction if isinstance(model.reduction, Chain) else None
    try:
        chain = parse_spec(spec, model.decoder.num_layers)
    except ConfigError as error:
        raise RequestError(str(error), field="reduce") from error
    if trained and chain.steps:
        raise RequestError(
            f"reduce={shown(spec)}: the model has a trained reduction of its own, expected 'none' or nothing",
            field="reduce",
        )
    if trained:
        return NoReduction()
    missing = [layer for layer in chain.boundaries if layer not in model.reduction.layers]
    if missing:
        loaded = ", ".join(str(layer + 1) for layer in model.reduction.layers) or "none"
        raise RequestError(
            f"reduce={shown(spec)}: the engine has no boundary before layer {missing[0] + 1} (it has: {loaded}); "
            f"load it with this reduction too",
            field="reduce",
        )
    return chain


def reduced_images(
    images: Sequence[VisualInput], chain: Chain | None, kept: Any
) -> tuple[tuple[VisualInput, ...], Kept | None]:
    """Images without what a chain leaves out before the decoder, and the rows that later boundaries are to keep.

    Args:
        images: with all their rows.
        chain: None: nothing is reduced by rules.
        kept: of the request: per boundary of the chain ascending rows, by their numbers at the chain's start, None
            where rows are pooled; with several images a list for each. None: the chain decides. Without a chain or an
            image a list of None alone, as such a request's `Pyramid` has it.

    Raises:
        RequestError: `kept` does not fit chain and images.
    """
    cuts = chain.cuts if chain is not None else ()
    keeps_nothing = (not cuts or not images) and isinstance(kept, list | tuple) and all(ids is None for ids in kept)
    relative = None if kept is None or keeps_nothing else _relative(kept, cuts, images)
    step = None if chain is None else chain.before_llm
    if step is not None:
        first = relative.pop(0) if relative else [None] * len(images)
        images = [
            image.reduced(step, place, rows) for place, (image, rows) in enumerate(zip(images, first, strict=True))
        ]
    if relative is None:
        return tuple(images), None
    return tuple(images), tuple(tuple(_NO_ROWS if ids is None else ids for ids in each) for each in relative)


_NO_ROWS = np.empty(0, dtype=np.int32)


def _relative(kept: Any, cuts: Sequence[Cut], images: Sequence[VisualInput]) -> list[list[IntArray | None]]:
    """Per cut and image the rows that stay, counted among those that reach the cut."""
    if not cuts or not images:
        raise RequestError(
            "kept: the request has no reduction that keeps rows of an image, expected none", field="kept"
        )
    if not isinstance(kept, Sequence) or isinstance(kept, str) or len(kept) != len(cuts):
        raise RequestError(
            f"kept: expected a list of {len(cuts)} entries, one per boundary, got {shown(kept)}", field="kept"
        )
    before = [image.segments for image in images]
    first, remaining = before, [np.arange(num_visual(segments)) for segments in before]
    found: list[list[IntArray | None]] = []
    for position, (cut, given) in enumerate(zip(cuts, kept, strict=True)):
        first = before if cut.index == 0 else first
        after = [cut.segments_after(*pair) for pair in zip(first, before, strict=True)]
        if cut.step.needs_grid:
            if given is not None:
                raise RequestError(f"kept[{position}]: {cut.step.method} pools rows, expected null", field="kept")
            found.append([None] * len(images))
            remaining = [np.arange(num_visual(segments)) for segments in after]
        else:
            lists = given if len(images) > 1 else [given]
            if not isinstance(lists, Sequence) or len(lists) != len(images):
                raise RequestError(f"kept[{position}]: expected {len(images)} lists, one per image", field="kept")
            checked = [
                _rows(f"kept[{position}]", ids, rows, num_visual(segments))
                for ids, rows, segments in zip(lists, remaining, after, strict=True)
            ]
            found.append(
                [np.searchsorted(rows, ids).astype(np.int32) for rows, ids in zip(remaining, checked, strict=True)]
            )
            remaining = checked
        before = after
    return found


def _rows(name: str, given: Any, remaining: np.ndarray, count: int) -> np.ndarray:
    """Checked rows of one image."""
    try:
        ids = np.array([operator.index(row) for row in given], dtype=np.int64)
    except (TypeError, OverflowError):
        raise RequestError(
            f"{name}: expected a list of {count} row numbers, got {shown(given)}", field="kept"
        ) from None
    if len(ids) != count:
        raise RequestError(f"{name}: {len(ids)} rows, expected {count}", field="kept")
    if (np.diff(ids) <= 0).any():
        raise RequestError(f"{name}: expected rows that rise, each once", field="kept")
    if not np.isin(ids, remaining).all():
        wrong = ids[~np.isin(ids, remaining)][0]
        raise RequestError(
            f"{name}: row {wrong}, expected some of the {len(remaining)} that are left before the boundary",
            field="kept",
        )
    return ids
