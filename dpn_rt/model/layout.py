"""Where the rows of a packed batch belong in one stage: offsets, positions, images, router rows.

A layout is never changed; a boundary returns a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dpn_rt.model.reduction.newlines import NO_NEWLINES

IntArray = npt.NDArray[np.int32]


class PromptRows(Protocol):
    """What a layout needs to know of one sequence at stage 0."""

    @property
    def num_rows(self) -> int:
        """Rows of text and images together."""

    @property
    def image_starts(self) -> Sequence[int]:
        """First visual row of each image, ascending."""

    @property
    def grids(self) -> Sequence[tuple[int, int]]:
        """Rows and columns of visual tokens of each image."""

    @property
    def router_rows(self) -> IntArray:
        """Rows that the routers read."""


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows of a stage, which go through it together."""

    sequences: slice
    """The sequences of the layout that have rows in it."""
    cu_seqlens: IntArray
    """`[num_seqs + 1]` first row of each of these sequences in the chunk, and the number of rows at the end."""
    positions: IntArray
    """`[num_rows]` rotary position of each row."""
    cache_rows: IntArray
    """`[num_rows]` row of its sequence's KV cache that each row is stored in."""
    context_lens: IntArray
    """`[num_seqs]` rows in the cache once the chunk is stored."""
    ends: npt.NDArray[np.int64]
    """`[num_ends]` which of these sequences end in the chunk."""
    last_rows: npt.NDArray[np.int64]
    """`[num_ends]` their last rows in the chunk."""

    @property
    def all_end(self) -> bool:
        return len(self.ends) == len(self.context_lens)

    @property
    def extends(self) -> bool:
        """Whether earlier rows of a sequence are in the cache."""
        return bool((np.diff(self.cu_seqlens) < self.context_lens).any())


@dataclass(frozen=True)
class Layout:
    """Rows of a batch of `num_seqs` sequences in one stage, packed one sequence after the other."""

    lengths: IntArray
    """`[num_seqs]` rows of each sequence that are computed."""
    first_cache_rows: IntArray
    """`[num_seqs]` rows of each sequence that are in the cache already; they come before the computed ones."""
    first_positions: IntArray
    """`[num_seqs]` rotary position of each sequence's first computed row; the others count on from it."""
    cu_images: IntArray
    """`[num_seqs + 1]` first image of each sequence, and the number of images at the end."""
    image_starts: IntArray
    """`[num_images]` first visual row of each image among the computed rows of its sequence."""
    grids: IntArray
    """`[num_images, 2]` rows and columns of each image's visual tokens; (1, n) where they are no grid, or several."""
    router_rows: IntArray
    """`[num_router_rows]` rows that the routers read, among the computed rows of their sequence."""
    cu_router_rows: IntArray
    """`[num_seqs + 1]` offsets into `router_rows`."""
    kept_positions: IntArray | None = None
    """`[num_rows]` rotary position of each packed row, where a boundary has left out rows and kept positions; None: the
    rows of each sequence count on."""
    num_skipped: IntArray | None = None
    """`[num_seqs]` positions that no row has any more; None: none."""
    newline_rows: tuple[IntArray, ...] = ()
    """Of each image its rows, ascending, that are newlines and no visual tokens; empty: no image has any."""

    @classmethod
    def of_prompts(cls, prompts: Sequence[PromptRows], num_cached: Sequence[int] | None = None) -> Layout:
        """The layout at stage 0.

        Args:
            prompts: one per sequence.
            num_cached: rows of each that are in the cache in every stage, all before its first image; None: none.
        """
        cached = np.zeros(len(prompts), dtype=np.int32) if num_cached is None else _int_array(num_cached)
        counts = _int_array([len(prompt.image_starts) for prompt in prompts])
        starts = _int_array([start for prompt in prompts for start in prompt.image_starts])
        rows = [prompt.router_rows - skipped for prompt, skipped in zip(prompts, cached, strict=True)]
        return cls(
            lengths=_int_array([prompt.num_rows for prompt in prompts]) - cached,
            first_cache_rows=cached,
            first_positions=cached,
            cu_images=cumulative(counts),
            image_starts=starts - np.repeat(cached, counts),
            grids=_int_array([grid for prompt in prompts for grid in prompt.grids]).reshape(-1, 2),
            router_rows=np.concatenate([*rows, _int_array([])], dtype=np.int32),
            cu_router_rows=cumulative(_int_array([len(sequence) for sequence in rows])),
        )

    @property
    def num_seqs(self) -> int:
        return len(self.lengths)

    @cached_property
    def cu_seqlens(self) -> IntArray:
        """`[num_seqs + 1]` first packed row of each sequence, and the number of rows at the end."""
        return cumulative(self.lengths)

    @property
    def num_rows(self) -> int:
        return int(self.cu_seqlens[-1])

    @cached_property
    def num_visual(self) -> IntArray:
        """`[num_seqs]` visual tokens of all images of each sequence."""
        return np.diff(cumulative(self.grids.prod(axis=1))[self.cu_images])

    @cached_property
    def image_lengths(self) -> IntArray:
        """`[num_images]` rows of each image: visual tokens and newlines."""
        lengths: IntArray = self.grids.prod(axis=1, dtype=np.int32)
        if self.newline_rows:
            lengths += _int_array([len(rows) for rows in self.newline_rows])
        return lengths

    @property
    def packed_image_starts(self) -> IntArray:
        """`[num_images]` first packed row of each image."""
        return self.image_starts + np.repeat(self.cu_seqlens[:-1], np.diff(self.cu_images))

    def newlines_of(self, image: int) -> IntArray:
        """Rows of an image that are newlines, ascending."""
        return self.newline_rows[image] if self.newline_rows else NO_NEWLINES

    @property
    def kv_lengths(self) -> IntArray:
        """`[num_seqs]` rows of each sequence that attention sees."""
        return self.first_cache_rows + self.lengths

    @property
    def next_positions(self) -> IntArray:
        """`[num_seqs]` rotary position of the row that is generated after each sequence."""
        counted = self.first_positions + self.lengths
        return counted if self.num_skipped is None else counted + self.num_skipped

    @cached_property
    def positions(self) -> IntArray:
        """`[num_rows]` rotary position of each packed row."""
        return self._count_from(self.first_positions) if self.kept_positions is None else self.kept_positions

    @cached_property
    def cache_rows(self) -> IntArray:
        """`[num_rows]` row of its sequence's KV cache that each packed row is stored in."""
        return self._count_from(self.first_cache_rows)

    def router_rows_from(self, offsets: IntArray) -> IntArray:
        """`[num_router_rows]` router rows where the sequences begin at `offsets` `[num_seqs + 1]`."""
        return self.router_rows + np.repeat(offsets[:-1], np.diff(self.cu_router_rows))

    def with_grids(self, grids: IntArray) -> Layout:
        """The layout after the images shrank to `grids` `[num_images, 2]`: later rows move up, and so do positions."""
        shrunk = cumulative((self.grids.prod(axis=1) - grids.prod(axis=1)).astype(np.int32))  # by images before
        before = shrunk[self.cu_images]  # by images of sequences before
        num_images, num_router_rows = np.diff(self.cu_images), np.diff(self.cu_router_rows)
        images_before = np.searchsorted(self.packed_image_starts, self.router_rows_from(self.cu_seqlens))
        return replace(
            self,
            lengths=self.lengths - np.diff(before),
            image_starts=self.image_starts - (shrunk[:-1] - np.repeat(before[:-1], num_images)),
            grids=grids,
            router_rows=self.router_rows - (shrunk[images_before] - np.repeat(before[:-1], num_router_rows)),
            kept_positions=None if self.kept_positions is None else self._positions_with(grids),
        )

    def _positions_with(self, grids: IntArray) -> IntArray:
        """Kept positions after the images shrank: rows are missing at the end of each."""
        assert self.kept_positions is not None
        is_left = np.ones(self.num_rows, dtype=bool)
        ends = self.packed_image_starts + self.image_lengths
        for end, removed in zip(ends, self.grids.prod(axis=1) - grids.prod(axis=1), strict=True):
            is_left[end - removed : end] = False
        return self.kept_positions[is_left]

    def with_newline_rows(self, newline_rows: Sequence[IntArray]) -> Layout:
        """The layout with what is known of its images' newline rows, see `newline_rows`."""
        return replace(self, newline_rows=tuple(newline_rows) if any(map(len, newline_rows)) else ())

    def with_kept_positions(self, positions: IntArray, num_skipped: IntArray) -> Layout:
        """The layout with the positions that rows had before some of them were left out.

        Args:
            positions: `[num_rows]`.
            num_skipped: `[num_seqs]` positions of each sequence that no row has any more.
        """
        if not num_skipped.any():
            return replace(self, kept_positions=None, num_skipped=None)
        return replace(self, kept_positions=positions, num_skipped=num_skipped)

    def skip_prefix(self, num_rows: IntArray) -> Layout:
        """The same sequences without their first `num_rows` `[num_seqs]` rows, which are in the cache in one stage.

        Only lengths, cache rows and positions are of use there.
        """
        return replace(
            self,
            lengths=self.lengths - num_rows,
            first_cache_rows=self.first_cache_rows + num_rows,
            first_positions=self.first_positions + num_rows,
        )

    def select(self, kept: npt.NDArray[np.intp]) -> Layout:
        """The layout of these sequences alone."""
        images, cu_images = _select_items(self.cu_images, kept)
        router_rows, cu_router_rows = _select_items(self.cu_router_rows, kept)
        rows, _ = _select_items(self.cu_seqlens, kept)
        return Layout(
            lengths=self.lengths[kept],
            first_cache_rows=self.first_cache_rows[kept],
            first_positions=self.first_positions[kept],
            cu_images=cu_images,
            image_starts=self.image_starts[images],
            grids=self.grids[images],
            router_rows=self.router_rows[router_rows],
            cu_router_rows=cu_router_rows,
            kept_positions=None if self.kept_positions is None else self.kept_positions[rows],
            num_skipped=None if self.num_skipped is None else self.num_skipped[kept],
            newline_rows=tuple(self.newline_rows[image] for image in images) if self.newline_rows else (),
        )

    def chunk(self, start: int, end: int) -> Chunk:
        """Rows `start` to `end` (excluded, above `start`) of the packed ones."""
        first, last = (int(np.searchsorted(self.cu_seqlens, row, side="right")) - 1 for row in (start, end - 1))
        offsets = np.clip(self.cu_seqlens[first : last + 2], start, end)
        ends = np.flatnonzero(self.cu_seqlens[first + 1 : last + 2] <= end)
        cache_rows = self.cache_rows[start:end]
        return Chunk(
            sequences=slice(first, last + 1),
            cu_seqlens=offsets - np.int32(start),
            positions=self.positions[start:end],
            cache_rows=cache_rows,
            context_lens=cache_rows[offsets[1:] - start - 1] + 1,
            ends=ends,
            last_rows=self.cu_seqlens[first + 1 + ends].astype(np.int64) - 1 - start,
        )

    def _count_from(self, first: IntArray) -> IntArray:
        return np.arange(self.num_rows, dtype=np.int32) + np.repeat(first - self.cu_seqlens[:-1], self.lengths)


def _select_items(cu_items: IntArray, kept: npt.NDArray[np.intp]) -> tuple[npt.NDArray[np.intp], IntArray]:
    """Of items grouped by sequence: which belong to the kept sequences, and their new offsets."""
    counts = np.diff(cu_items)[kept]
    offsets = cumulative(counts)
    items = np.arange(offsets[-1]) + np.repeat(cu_items[kept] - offsets[:-1], counts)
    return items.astype(np.intp), offsets


def _int_array(values: Sequence[int] | Sequence[tuple[int, int]]) -> IntArray:
    return np.asarray(values, dtype=np.int32)


def cumulative(lengths: npt.NDArray[np.integer]) -> IntArray:
    """`[num_items + 1]` where each of consecutive items begins, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
