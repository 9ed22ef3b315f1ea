"""The reducer of training-free methods: some visual rows are kept as they are, or all are pooled, per sequence.

How many rows stay is known beforehand, so the next layout is made on the host without waiting. Which rows stay is told
later, with the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.device.device import Device, Readback
from dpn_rt.model.layout import IntArray, Layout, cumulative
from dpn_rt.model.reduction.choice import Choice
from dpn_rt.model.reduction.pool import Pool
from dpn_rt.model.reduction.reducer import Outcome, StageOutput
from dpn_rt.ops import DeviceLayout


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
        rows = tuple(np.empty(0, dtype=np.int32) if ids is None else ids for ids in kept)
        known = Choice(cut=choice.cut, grids=choice.grids, kept=rows)
        return Outcome(experts=(None,) * len(kept), kernels=(None,) * len(kept), kept=kept, choice=known)


class KeptRows:
    """`Reduced`: rows on their way whose number is known."""

    def __init__(
        self,
        rows: Tensor,
        next_keys: Tensor | None,
        device_layout: DeviceLayout,
        layout: Layout,
        selection: Selection,
        readback: Readback,
    ) -> None:
        """
        Args:
            rows: of the next stage.
            next_keys: see `Reduced`.
            device_layout: of the next stage.
            layout: of the next stage, but for positions that were kept.
            selection: which rows.
            readback: of `selection.kept`.
        """
        self.rows, self.next_keys, self.device_layout = rows, next_keys, device_layout
        self.has_cached_rows = bool(layout.first_cache_rows.any())
        self.num_rows = layout.num_rows
        self._layout, self._selection, self._readback = layout, selection, readback

    def finish(self) -> tuple[Layout, KeepTrace]:
        """The next stage's layout on the host, and what was done."""
        (kept,) = self._readback.wait()
        return self._selection.with_positions(self._layout, kept), self._selection.trace(kept)


@dataclass(frozen=True, eq=False)
class Selection:
    """Which rows of a stage go on: all text, and of each image some rows, whose ids are known on the device."""

    layout: Layout
    """Of the stage that ends, with pooled images as they are after pooling."""
    choices: tuple[Choice, ...]
    """Per sequence."""
    grids: IntArray
    """`[num_images, 2]` after the boundary."""

    @cached_property
    def counts(self) -> IntArray:
        """`[num_images]` rows that stay of each image."""
        counts: IntArray = self.grids.prod(axis=1, dtype=np.int32)
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

    def row_ids(self, kept: IntArray) -> npt.NDArray[np.intp]:
        """`[num rows after]` packed row that each row after the boundary comes from; on the host.

        Args:
            kept: `[sum of counts]` ascending rows of each image.
        """
        layout = self.layout
        is_kept = np.ones(layout.num_rows, dtype=bool)
        starts = layout.image_starts + np.repeat(layout.cu_seqlens[:-1], np.diff(layout.cu_images))
        for image, (start, size) in enumerate(zip(starts, layout.grids.prod(axis=1), strict=True)):
            is_kept[start : start + size] = False
            is_kept[start + kept[self.cu_kept[image] : self.cu_kept[image + 1]]] = True
        return np.flatnonzero(is_kept)

    def with_positions(self, after: Layout, kept: IntArray) -> Layout:
        """The next stage's layout, with the positions that are kept."""
        before = self.layout
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
        per_image: list[IntArray | None] = [
            kept[self.cu_kept[i] : self.cu_kept[i + 1]].copy() for i in range(len(self.counts))
        ]
        ends = self.layout.cu_images
        return KeepTrace(
            self.choices, tuple(tuple(per_image[ends[i] : ends[i + 1]]) for i in range(self.layout.num_seqs))
        )


class KeepReducer:
    """`Reducer`: what each sequence's own method does at one boundary."""

    reads_queries = True

    def __init__(self, device: Device) -> None:
        self._device = device

    def most_rows(self, layout: Layout, choices: Sequence[Choice]) -> IntArray:
        """`[num_seqs]` rows that attention sees after the boundary; exact."""
        return layout.with_grids(_grids_after(layout, choices)).kv_lengths

    def reduce(self, output: StageOutput) -> KeptRows | None:
        """Pools the images of some sequences and keeps rows of others; None where nothing is reduced."""
        layout, choices = output.layout, tuple(output.choices)
        grids = _grids_after(layout, choices)
        if not any(choice.cut is not None for _, choice in _images_of(layout, choices)):
            return None
        scored, keys = self._kept_by_scores(output, grids)  # of the rows as they are: pooling moves them
        rows, layout = self._pool(output.rows, layout, choices, grids)
        selection = Selection(layout, choices, grids)
        kept = self._kept(selection, scored)
        after = layout.with_grids(grids)
        row_ids = self._row_ids(selection, after, kept)
        device_layout = self._device_layout(selection, after, row_ids)
        readback = self._device.read(kept)
        next_keys = None if keys is None or rows is not output.rows else keys.index_select(0, row_ids)
        return KeptRows(rows.index_select(0, row_ids), next_keys, device_layout, after, selection, readback)

    def _kept_by_scores(self, output: StageOutput, grids: IntArray) -> tuple[dict[int, Tensor], Tensor | None]:
        """Image -> `[count]` int32 ascending rows that attention chooses; and the keys of the next layer, if it was
        asked."""
        layout, counts = output.layout, grids.prod(axis=1)
        found: dict[int, Tensor] = {}
        keys: Tensor | None = None
        for place in ("here", "next"):
            images = np.array(
                [
                    image
                    for image, choice in _images_of(layout, output.choices)
                    if choice.cut is not None and choice.kept is None and choice.cut.step.scores == place
                ],
                dtype=np.int32,
            )
            if not len(images):
                continue
            assert output.scores is not None, "an engine without scores refuses methods that need them"
            if place == "here":
                scores = output.scores.here(layout, images)
            else:
                ahead = output.scores.next(output.rows, layout, images)
                scores, keys = ahead.scores, ahead.keys
            sizes = layout.grids[images].prod(axis=1)
            cu_scores, cu_kept = self._device.upload(cumulative(sizes), cumulative(counts[images]))
            kept = torch.empty(int(counts[images].sum()), dtype=torch.int32, device=scores.device)
            ops.segmented_top_k(scores, cu_scores, cu_kept, out=kept)
            found |= dict(zip(images.tolist(), torch.split(kept, counts[images].tolist()), strict=True))
        return found, keys

    def _pool(self, rows: Tensor, layout: Layout, choices: Sequence[Choice], grids: IntArray) -> tuple[Tensor, Layout]:
        """The rows and the layout after all images were pooled whose sequence says so."""
        steps = {
            image: choice.cut.step
            for image, choice in _images_of(layout, choices)
            if choice.cut is not None and isinstance(choice.cut.step, Pool)
        }
        for function in ("avg", "max"):
            mine = {image: step for image, step in steps.items() if step.function == function}
            kernels = list(dict.fromkeys(step.kernel for step in mine.values()))
            if not kernels:
                continue
            experts = np.full(len(layout.grids), -1, dtype=np.int32)
            pooled = layout.grids.copy()
            for image, step in mine.items():
                if tuple(layout.grids[image]) != tuple(grids[image]):
                    experts[image], pooled[image] = kernels.index(step.kernel), grids[image]
            after = layout.with_grids(pooled)
            cu_seqlens, cu_images, starts, before, chosen, kernel_table, out_cu_seqlens = self._device.upload(
                layout.cu_seqlens,
                layout.cu_images,
                layout.image_starts,
                layout.grids,
                experts,
                np.asarray(kernels, dtype=np.int32),
                after.cu_seqlens,
            )
            rows = ops.pool(
                rows,
                cu_seqlens,
                cu_images,
                starts,
                before,
                chosen,
                kernel_table,
                out_cu_seqlens,
                function="avg" if function == "avg" else "max",
            )[: after.num_rows]
            layout = after
        return rows, layout

    def _kept(self, selection: Selection, scored: dict[int, Tensor]) -> Tensor:
        """`[sum of counts]` int32 ascending rows of each image, on the device."""
        parts: list[Tensor | IntArray] = []
        place = 0
        layout = selection.layout
        for image, choice in _images_of(layout, selection.choices):
            place = 0 if image in layout.cu_images[:-1] else place + 1
            count = int(selection.counts[image])
            if image in scored:
                parts.append(scored[image])
                continue
            rows: IntArray | None = None
            if choice.kept is not None:
                rows = choice.kept[place]
            elif choice.cut is not None:
                height, width = map(int, layout.grids[image])
                rows = choice.cut.step.choose(place, (height, width), count)
            parts.append(np.arange(count, dtype=np.int32) if rows is None else rows)
        known = np.concatenate([part for part in parts if isinstance(part, np.ndarray)] or [np.empty(0, np.int32)])
        (uploaded,) = self._device.upload(known.astype(np.int32))
        if not scored:
            return uploaded
        pieces, first = [], 0
        for part in parts:
            if isinstance(part, np.ndarray):
                pieces.append(uploaded[first : first + len(part)])
                first += len(part)
            else:
                pieces.append(part)
        return torch.cat(pieces)

    def _row_ids(self, selection: Selection, after: Layout, kept: Tensor) -> Tensor:
        """`[num rows after]` int64 packed row that each row after the boundary comes from."""
        layout = selection.layout
        arrays = self._device.upload(
            layout.cu_seqlens,
            layout.cu_images,
            layout.image_starts,
            layout.grids.prod(axis=1, dtype=np.int32),
            selection.cu_kept,
            after.cu_seqlens,
        )
        cu_seqlens, cu_images, starts, lengths, cu_kept, out_cu_seqlens = arrays
        row_ids = torch.empty(after.num_rows, dtype=torch.int64, device=kept.device)
        return ops.kept_rows(
            cu_seqlens,
            cu_images,
            starts,
            lengths,
            kept,
            cu_kept,
            out_cu_seqlens,
            num_tokens=layout.num_rows,
            out=row_ids,
        )

    def _device_layout(self, selection: Selection, after: Layout, row_ids: Tensor) -> DeviceLayout:
        """The next stage's layout, with positions that were kept."""
        before, renumbers = selection.layout, selection.renumbers
        counted = after.with_kept_positions(after.positions, np.zeros_like(after.lengths))
        (
            cu_seqlens, first_positions, first_cache_rows, cu_images, image_starts, grids, router_rows, cu_router_rows,
            positions, cache_rows, before_positions, is_counted,
        ) = self._device.upload(
            after.cu_seqlens, after.first_positions, after.first_cache_rows, after.cu_images, after.image_starts,
            after.grids, after.router_rows_from(after.cu_seqlens), after.cu_router_rows,
            counted.positions, after.cache_rows, before.positions, np.repeat(renumbers, after.lengths),
        )  # fmt: skip
        if not renumbers.all():
            positions = torch.where(is_counted, positions, before_positions.index_select(0, row_ids))
        return DeviceLayout(
            cu_seqlens=cu_seqlens,
            first_positions=first_positions,
            first_cache_rows=first_cache_rows,
            cu_images=cu_images,
            image_starts=image_starts,
            grids=grids,
            router_rows=router_rows,
            cu_router_rows=cu_router_rows,
            positions=positions,
            cache_rows=cache_rows,
        )


def _images_of(layout: Layout, choices: Sequence[Choice]) -> list[tuple[int, Choice]]:
    """Each image of a layout, with the choice of its sequence."""
    counts = np.diff(layout.cu_images)
    return list(enumerate(choice for choice, count in zip(choices, counts, strict=True) for _ in range(count)))


def _grids_after(layout: Layout, choices: Sequence[Choice]) -> IntArray:
    """`[num_images, 2]` after the boundary."""
    grids = layout.grids.copy()
    for index, choice in enumerate(choices):
        if choice.cut is not None:
            first, end = layout.cu_images[index : index + 2]
            grids[first:end] = np.asarray(choice.grids, dtype=np.int32).reshape(-1, 2)
    return grids
