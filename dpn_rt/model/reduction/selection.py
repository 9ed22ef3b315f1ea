"""Which rows of a stage go on, where the reduction needs no training, and what users are told about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from dpn_rt.model.layout import IntArray, Layout, cumulative
from dpn_rt.model.reduction.choice import Choice
from dpn_rt.model.reduction.grid import as_grid, num_visual
from dpn_rt.model.reduction.newlines import newlines_among, rows_of, tokens_of
from dpn_rt.model.reduction.pool import Pool
from dpn_rt.model.reduction.reducer import Outcome
from dpn_rt.model.reduction.segment_pool import first_tokens

NO_ROWS: IntArray = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, eq=False)
class KeepTrace:
    """What a boundary did."""

    choices: tuple[Choice, ...]
    """Per sequence."""
    kept: tuple[tuple[IntArray | None, ...], ...]
    """Per sequence and image: see `Outcome`."""

    def select(self, kept: npt.NDArray[np.intp]) -> Self:
        """Of these sequences alone."""
        return type(self)(tuple(self.choices[i] for i in kept), tuple(self.kept[i] for i in kept))

    def outcome(self, index: int) -> Outcome:
        """Of one sequence."""
        choice, kept = self.choices[index], self.kept[index]
        if choice.cut is None:
            return Outcome(experts=(None,) * len(kept), kernels=(None,) * len(kept), choice=choice)
        step = choice.cut.step
        if isinstance(step, Pool):
            return Outcome(experts=(None,) * len(kept), kernels=(step.kernel,) * len(kept), choice=choice)
        known = replace(choice, kept=tuple(NO_ROWS if ids is None else ids for ids in kept))
        return Outcome(experts=(None,) * len(kept), kernels=(None,) * len(kept), kept=kept, choice=known)


@dataclass(frozen=True, eq=False)
class Selection:
    """Which rows of a stage go on: all text, and of each image some rows, whose ids are known on the device."""

    layout: Layout
    """Of the stage that ends."""
    choices: tuple[Choice, ...]
    """Per sequence."""
    grids: IntArray
    """`[num_images, 2]` after the boundary."""

    @cached_property
    def counts(self) -> IntArray:
        """`[num_images]` rows that stay of each image: visual tokens and newlines."""
        removed = self.layout.grids.prod(axis=1, dtype=np.int32) - self.grids.prod(axis=1, dtype=np.int32)
        counts: IntArray = self.layout.image_lengths - removed
        return counts

    @cached_property
    def cu_kept(self) -> IntArray:
        """`[num_images + 1]` offsets of each image's kept rows."""
        return cumulative(self.counts)

    @property
    def renumbers(self) -> npt.NDArray[np.bool_]:
        """`[num_seqs]` whether positions count on from the first one."""
        cuts = [choice.cut for choice in self.choices]
        return np.array([cut is not None and not cut.step.keeps_positions for cut in cuts], dtype=bool)

    @cached_property
    def images(self) -> list[tuple[int, Choice]]:
        """Of each image its place in its prompt, and the choice of its sequence."""
        pairs = zip(self.choices, np.diff(self.layout.cu_images), strict=True)
        return [(place, choice) for choice, count in pairs for place in range(count)]

    def known_rows(self, image: int) -> IntArray:
        """`[counts[image]]` ascending rows that stay of an image whose rows attention does not choose."""
        place, choice = self.images[image]
        length = int(self.layout.image_lengths[image])
        if choice.cut is None:
            return np.arange(length, dtype=np.int32)
        step, before = choice.cut.step, choice.before[place]
        tokens: IntArray | None
        if isinstance(step, Pool):
            tokens = first_tokens(before, step)
        elif choice.kept is not None:
            tokens = choice.kept[place]
        else:
            tokens = step.choose(place, as_grid(before), num_visual(choice.after[place]))
        assert tokens is not None, "attention chooses the rows"
        return rows_of(tokens, length, self.layout.newlines_of(image))

    def kept_of(self, kept: IntArray, image: int) -> IntArray:
        """`[counts[image]]` of one image, of the kept rows of all."""
        return kept[self.cu_kept[image] : self.cu_kept[image + 1]]

    def row_ids(self, kept: IntArray) -> npt.NDArray[np.intp]:
        """`[num rows after]` packed row that each row after the boundary comes from; on the host.

        Args:
            kept: `[sum of counts]` ascending rows of each image.
        """
        layout = self.layout
        is_kept = np.ones(layout.num_rows, dtype=bool)
        for image, (start, size) in enumerate(zip(layout.packed_image_starts, layout.image_lengths, strict=True)):
            is_kept[start : start + size] = False
            is_kept[start + self.kept_of(kept, image)] = True
        return np.flatnonzero(is_kept)

    def with_rows(self, after: Layout, kept: IntArray) -> Layout:
        """The next stage's layout, with the positions that are kept, and where newline rows are now."""
        before = self.layout
        if before.newline_rows:
            newlines = [newlines_among(self.kept_of(kept, i), rows) for i, rows in enumerate(before.newline_rows)]
            after = after.with_newline_rows(newlines)
        removed = before.lengths - after.lengths
        skipped = np.zeros_like(removed) if before.num_skipped is None else before.num_skipped
        skipped = np.where(self.renumbers, 0, skipped + removed).astype(np.int32)
        if not skipped.any():
            return after.with_kept_positions(after.positions, skipped)
        positions = before.positions[self.row_ids(kept)]
        counted = after.with_kept_positions(positions, np.zeros_like(skipped)).positions
        is_counted = np.repeat(self.renumbers, after.lengths)
        return after.with_kept_positions(np.where(is_counted, counted, positions), skipped)

    def trace(self, kept: IntArray) -> KeepTrace:
        """What was done, per sequence."""
        layout, ends = self.layout, self.layout.cu_images
        per_image: list[IntArray | None] = [
            tokens_of(self.kept_of(kept, image), layout.newlines_of(image)).copy() for image in range(len(self.counts))
        ]
        return KeepTrace(self.choices, tuple(tuple(per_image[ends[i] : ends[i + 1]]) for i in range(layout.num_seqs)))
