"""Where the rows of a packed batch belong: offsets, grids, router rows, positions of one stage.

A layout is never changed; a boundary returns a new one (`pooled`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]


class PromptRows(Protocol):
    """What a layout needs to know of one sequence at stage 0."""

    @property
    def num_rows(self) -> int:
        """Rows of text and image together."""

    @property
    def image_start(self) -> int | None:
        """First visual row; None without an image."""

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of visual tokens; None without an image."""

    @property
    def router_rows(self) -> IntArray:
        """Rows that the routers read."""


@dataclass(frozen=True)
class Layout:
    """Rows of a batch of `num_seqs` sequences in one stage, packed one sequence after the other."""

    lengths: IntArray
    """`[num_seqs]` rows of each sequence that are computed."""
    first_rows: IntArray
    """`[num_seqs]` rows before them, which are in the cache: text, in every stage the same."""
    image_start: IntArray
    """`[num_seqs]` first visual row among those computed, -1 without an image."""
    grids: IntArray
    """`[num_seqs, 2]` rows and columns of visual tokens, (0, 0) without an image."""
    router_rows: IntArray
    """`[num_router_rows]` rows that the router reads, among those computed of their sequence."""
    cu_router_rows: IntArray
    """`[num_seqs + 1]` offsets into `router_rows`."""

    @classmethod
    def of_prompts(cls, prompts: Sequence[PromptRows], first_rows: Sequence[int] | None = None) -> Layout:
        """The layout at stage 0.

        Args:
            prompts: one per sequence.
            first_rows: rows of each that are in the cache, before its image; None: none.
        """
        first = [0] * len(prompts) if first_rows is None else list(first_rows)
        rows = [prompt.router_rows - start for prompt, start in zip(prompts, first, strict=True)]
        starts = [prompt.image_start for prompt in prompts]
        return cls(
            lengths=_int_array([prompt.num_rows - start for prompt, start in zip(prompts, first, strict=True)]),
            first_rows=_int_array(first),
            image_start=_int_array([-1 if s is None else s - f for s, f in zip(starts, first, strict=True)]),
            grids=_int_array([prompt.grid or (0, 0) for prompt in prompts]).reshape(-1, 2),
            router_rows=np.concatenate(rows, dtype=np.int32),
            cu_router_rows=_offsets(_int_array([len(sequence) for sequence in rows])),
        )

    @property
    def num_seqs(self) -> int:
        return len(self.lengths)

    @cached_property
    def cu_seqlens(self) -> IntArray:
        """`[num_seqs + 1]` first packed row of each sequence, and the number of rows at the end."""
        return _offsets(self.lengths)

    @cached_property
    def num_visual(self) -> IntArray:
        """`[num_seqs]` visual tokens."""
        return self.grids[:, 0] * self.grids[:, 1]

    @property
    def kv_lengths(self) -> IntArray:
        """`[num_seqs]` rows of each sequence that attention sees."""
        return self.first_rows + self.lengths

    @cached_property
    def positions(self) -> IntArray:
        """`[num_rows]` position of each packed row: every stage numbers its rows from 0."""
        rows = np.arange(self.cu_seqlens[-1], dtype=np.int32)
        return rows - np.repeat(self.cu_seqlens[:-1] - self.first_rows, self.lengths)

    @cached_property
    def last_rows(self) -> npt.NDArray[np.int64]:
        """`[num_seqs]` packed row of each sequence's last token."""
        return self.cu_seqlens[1:].astype(np.int64) - 1

    def router_rows_from(self, offsets: IntArray) -> IntArray:
        """`[num_router_rows]` router rows where the sequences begin at `offsets` `[num_seqs + 1]`."""
        return self.router_rows + np.repeat(offsets[:-1], np.diff(self.cu_router_rows))

    def pooled(self, grids: IntArray) -> Layout:
        """The layout after the visual tokens shrank to `grids` `[num_seqs, 2]`; router rows move up with the text."""
        shrink = self.num_visual - grids[:, 0] * grids[:, 1]
        behind_image = self.router_rows > np.repeat(self.image_start, np.diff(self.cu_router_rows))
        moved = np.where(behind_image, np.repeat(shrink, np.diff(self.cu_router_rows)), 0)
        return replace(
            self,
            lengths=self.lengths - shrink,
            grids=grids,
            router_rows=(self.router_rows - moved).astype(np.int32),
        )

    def behind(self, num_rows: IntArray) -> Layout:
        """The same sequences without their first `num_rows` `[num_seqs]` rows, which are in the cache in one stage.

        Only what places rows is of use there: lengths and positions.
        """
        return replace(self, lengths=self.lengths - num_rows, first_rows=self.first_rows + num_rows)

    def select(self, kept: npt.NDArray[np.intp]) -> Layout:
        """The layout of these sequences alone."""
        counts = np.diff(self.cu_router_rows)
        rows = np.split(self.router_rows, self.cu_router_rows[1:-1])
        return Layout(
            lengths=self.lengths[kept],
            first_rows=self.first_rows[kept],
            image_start=self.image_start[kept],
            grids=self.grids[kept],
            router_rows=np.concatenate([rows[i] for i in kept] or [self.router_rows[:0]], dtype=np.int32),
            cu_router_rows=_offsets(counts[kept]),
        )


def _int_array(values: Sequence[int] | Sequence[tuple[int, int]]) -> IntArray:
    return np.asarray(values, dtype=np.int32)


def _offsets(lengths: IntArray) -> IntArray:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
