"""The reducer of training-free methods: some visual rows are kept as they are, or all are pooled, per sequence.

How many rows stay is known beforehand, so the next layout is made on the host without waiting. Which rows stay is told
later, with the trace.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.device.device import Device, Known, Readback
from dpn_rt.model.layout import IntArray, Layout, cumulative
from dpn_rt.model.reduction.choice import Choice
from dpn_rt.model.reduction.grid import Segments, as_grid
from dpn_rt.model.reduction.newlines import visual_rows
from dpn_rt.model.reduction.pool import Pool
from dpn_rt.model.reduction.reducer import StageOutput
from dpn_rt.model.reduction.segment_pool import first_tokens, pooled_tokens
from dpn_rt.model.reduction.selection import NO_ROWS, KeepTrace, Selection
from dpn_rt.ops import DeviceLayout


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
            layout: of the next stage, but for positions that were kept and newline rows.
            selection: which rows.
            readback: of `selection.kept`.
        """
        self.rows, self.next_keys, self.device_layout = rows, next_keys, device_layout
        self.has_cached_rows = bool(layout.first_cache_rows.any())
        self.num_rows = layout.num_rows
        self._layout, self._selection, self._readback = layout, selection, readback

    def finish(self) -> tuple[Layout, KeepTrace]:
        """The next stage's layout on the host, and what was done."""
        kept = self._readback.wait()
        return self._selection.with_rows(self._layout, kept), self._selection.trace(kept)


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
        layout = output.layout
        selection = Selection(layout, tuple(output.choices), _grids_after(layout, output.choices))
        if not any(choice.cut is not None for _, choice in selection.images):
            return None
        scored, keys = self._kept_by_scores(output, selection)
        kept, readback = self._kept(selection, scored)
        after = layout.with_grids(selection.grids)
        row_ids = self._row_ids(selection, after, kept)
        rows = output.rows.index_select(0, row_ids)
        if self._pool(output.rows, rows, selection, after):
            keys = None  # of rows that have other values now
        device_layout = self._device_layout(selection, after, row_ids)
        next_keys = None if keys is None else keys.index_select(0, row_ids)
        return KeptRows(rows, next_keys, device_layout, after, selection, readback)

    def _kept_by_scores(self, output: StageOutput, selection: Selection) -> tuple[dict[int, Tensor], Tensor | None]:
        """Image -> `[count]` int32 ascending rows that attention chooses, and newlines; and the keys of the next layer,
        if it was asked."""
        layout, counts = output.layout, selection.counts
        found: dict[int, Tensor] = {}
        keys: Tensor | None = None
        for where in ("here", "next"):
            images = np.array(
                [
                    image
                    for image, (_, choice) in enumerate(selection.images)
                    if choice.cut is not None and choice.kept is None and choice.cut.step.scores == where
                ],
                dtype=np.int32,
            )
            if not len(images):
                continue
            assert output.scores is not None, "an engine without scores refuses methods that need them"
            if where == "here":
                scores = output.scores.here(layout, images)
            else:
                ahead = output.scores.next(output.rows, layout, images)
                scores, keys = ahead.scores, ahead.keys
            cu_rows = cumulative(layout.image_lengths[images])
            newlines = [first + layout.newlines_of(image) for first, image in zip(cu_rows, images, strict=False)]
            cu_scores, cu_kept, always = self._device.upload(
                cu_rows, cumulative(counts[images]), np.concatenate(newlines).astype(np.int64)
            )
            if layout.newline_rows:
                scores = scores.index_fill_(0, always, torch.inf)
            kept = torch.empty(int(counts[images].sum()), dtype=torch.int32, device=scores.device)
            ops.segmented_top_k(scores, cu_scores, cu_kept, out=kept)
            found |= dict(zip(images.tolist(), torch.split(kept, counts[images].tolist()), strict=True))
        return found, keys

    def _pool(self, rows: Tensor, kept_rows: Tensor, selection: Selection, after: Layout) -> bool:
        """Writes pooled values into the rows that stay of images whose sequence says so; whether there are any.

        Args:
            rows: of the stage that ends.
            kept_rows: of the next one.
            selection: of `kept_rows`.
            after: layout of the next stage.
        """
        layout = selection.layout
        pooled: dict[str, list[tuple[int, Segments, Pool]]] = {}
        for image, (place, choice) in enumerate(selection.images):
            if choice.cut is not None and isinstance(choice.cut.step, Pool):
                of_function = pooled.setdefault(choice.cut.step.function, [])
                of_function.append((image, choice.before[place], choice.cut.step))
        for images in pooled.values():
            sources, places = [], []
            for image, segments, step in images:
                tokens = visual_rows(int(layout.image_lengths[image]), layout.newlines_of(image))
                stay = selection.known_rows(image).searchsorted(tokens[first_tokens(segments, step)])
                sources.append(layout.packed_image_starts[image] + tokens)
                places.append(after.packed_image_starts[image] + stay)
            source_ids, place_ids = self._device.upload(
                np.concatenate(sources).astype(np.int64), np.concatenate(places).astype(np.int64)
            )
            tokens_of_images = [(segments, step) for _, segments, step in images]
            values = pooled_tokens(rows.index_select(0, source_ids), tokens_of_images, self._device.upload)
            kept_rows.index_copy_(0, place_ids, values)
        return bool(pooled)

    def _kept(self, selection: Selection, scored: dict[int, Tensor]) -> tuple[Tensor, Readback]:
        """`[sum of counts]` int32 ascending rows of each image, on the device and on their way to the host.

        Nothing is transferred back where the host knows all of them.
        """
        known = [selection.known_rows(image) for image in range(len(selection.counts)) if image not in scored]
        all_known = np.concatenate([*known, NO_ROWS])
        (uploaded,) = self._device.upload(all_known)
        if not scored:
            return uploaded, Known(all_known)
        of_known = iter(torch.split(uploaded, [len(rows) for rows in known]))
        images = range(len(selection.counts))
        kept = torch.cat([scored[image] if image in scored else next(of_known) for image in images])
        return kept, self._device.read(kept)

    def _row_ids(self, selection: Selection, after: Layout, kept: Tensor) -> Tensor:
        """`[num rows after]` int64 packed row that each row after the boundary comes from."""
        layout = selection.layout
        arrays = self._device.upload(
            layout.cu_seqlens,
            layout.cu_images,
            layout.image_starts,
            layout.image_lengths,
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


def _grids_after(layout: Layout, choices: Sequence[Choice]) -> IntArray:
    """`[num_images, 2]` after the boundary."""
    grids = layout.grids.copy()
    for index, choice in enumerate(choices):
        if choice.cut is not None:
            first, end = layout.cu_images[index : index + 2]
            grids[first:end] = np.asarray([as_grid(after) for after in choice.after], dtype=np.int32).reshape(-1, 2)
    return grids
