"""Reduction of one image's rows before the decoder sees them: it depends on the image alone, not on the question."""

from __future__ import annotations

import torch
from torch import Tensor

from dpn_rt.device.transfer import to_device
from dpn_rt.model.reduction.divprune import DivPrune, most_diverse
from dpn_rt.model.reduction.grid import IntArray, Segments, as_grid, num_visual
from dpn_rt.model.reduction.newlines import newlines_among, rows_of, visual_rows
from dpn_rt.model.reduction.pool import Pool
from dpn_rt.model.reduction.segment_pool import first_tokens, pooled_tokens, upload_to
from dpn_rt.model.reduction.step import Cut, Step


def segments_before_llm(step: Step, segments: Segments) -> Segments:
    """What a step whose only boundary is before the decoder leaves of an image."""
    return Cut(step, 0).segments_after(segments, segments)


def known_tokens(step: Step, image: int, segments: Segments, kept: IntArray | None) -> IntArray | None:
    """The visual tokens of an image that stay, as far as numbers decide.

    Args:
        step: whose only boundary is before the decoder.
        image: its place among the images of its prompt.
        segments: of the image.
        kept: `[n]` ascending tokens that are to stay; None: the step decides.

    Returns:
        `[n]` ascending; None where tokens are pooled, or their values decide.
    """
    if kept is not None:
        return kept
    return step.choose(image, as_grid(segments), num_visual(segments_before_llm(step, segments)))


def newlines_before_llm(
    step: Step, segments: Segments, num_rows: int, newlines: IntArray, kept: IntArray | None
) -> IntArray:
    """`[num_newlines]` where the newline rows are in what is left of an image.

    Args:
        step: whose only boundary is before the decoder.
        segments: of the image.
        num_rows: of the image.
        newlines: `[num_newlines]` its newline rows.
        kept: `[n]` ascending tokens that stay; None where they are pooled.
    """
    if isinstance(step, Pool):
        kept = first_tokens(segments, step)
    assert kept is not None, "a step that pools no tokens keeps some"
    return newlines_among(rows_of(kept, num_rows, newlines), newlines)


def reduce_image(
    rows: Tensor, step: Step, segments: Segments, newlines: IntArray, known: IntArray | None
) -> tuple[Tensor, IntArray | None]:
    """What is left of an image.

    Args:
        rows: `[num_rows, hidden_size]`.
        step: whose only boundary is before the decoder.
        segments: of the image.
        newlines: `[num_newlines]` ascending rows that are newlines.
        known: see `known_tokens`.

    Returns:
        `[n, hidden_size]`, and the ascending visual tokens that stay; None where they were pooled.
    """
    if isinstance(step, Pool):
        return _pooled(rows, step, segments, newlines), None
    if known is None:
        assert isinstance(step, DivPrune), "other methods choose by numbers, or need the decoder"
        tokens = _take(rows, visual_rows(len(rows), newlines))
        count = num_visual(segments_before_llm(step, segments))
        known = most_diverse(tokens, count).sort().values.cpu().numpy().astype("int32")
    return _take(rows, rows_of(known, len(rows), newlines)), known


def _pooled(rows: Tensor, step: Pool, segments: Segments, newlines: IntArray) -> Tensor:
    tokens = visual_rows(len(rows), newlines)
    values = pooled_tokens(_take(rows, tokens), [(segments, step)], upload_to(rows.device))
    if not len(newlines):
        return values
    firsts = first_tokens(segments, step)
    stays = rows_of(firsts, len(rows), newlines)
    places = to_device(torch.from_numpy(stays.searchsorted(tokens[firsts])), rows.device)
    return _take(rows, stays).index_copy_(0, places, values)


def _take(rows: Tensor, numbers: IntArray) -> Tensor:
    return rows.index_select(0, to_device(torch.from_numpy(numbers.astype("int64")), rows.device))
