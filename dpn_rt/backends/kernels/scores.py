"""Attention of last prompt rows to visual rows: what ranks them for reducers, from the cache or ahead of a stage."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dpn_rt.backends.kernels.executor import Executor, KeysInCache, NextLayerInputs, ScoredRows
from dpn_rt.cache.block_allocator import BlockAllocator, Slots
from dpn_rt.device.device import Device
from dpn_rt.model.layout import IntArray, Layout, cumulative
from dpn_rt.model.reduction.reducer import NextScores
from dpn_rt.model.windows import last_row_first_keys


class KernelScores:
    """`AttentionScores` at the end of one stage."""

    def __init__(
        self,
        executor: Executor,
        stage: int,
        queries: Tensor | None,
        cache: BlockAllocator,
        slots: Slots,
        device: Device,
    ) -> None:
        """
        Args:
            executor: of the engine.
            stage: that has ended.
            queries: `[num_seqs, num_heads, head_dim]` see `StageRun`.
            cache: of the sequences.
            slots: `[num_seqs]` of the layout's sequences.
            device: of all tensors.
        """
        self._executor, self._stage, self._queries = executor, stage, queries
        self._cache, self._slots, self._device = cache, slots, device

    def here(self, layout: Layout, images: IntArray) -> Tensor:
        """Of the stage's last layer, whose rotated keys are in the cache."""
        assert self._queries is not None, "the stage was asked for its queries"
        chosen, segments = np.unique(_owners(layout, images), return_inverse=True)
        stage = self._executor.decoder.stages[self._stage]
        group, _ = stage.last_layer_place
        tables = self._cache.block_tables(self._stage, self._slots[chosen])[group]
        first_rows = layout.first_cache_rows[chosen]
        window = stage.last_layer.window
        block_table, kv_lengths, of_query, starts, cu_scores, rows, *first_keys = self._device.upload(
            np.ascontiguousarray(tables),
            layout.kv_lengths[chosen],
            segments.astype(np.int32),
            layout.image_starts[images] + first_rows[segments],
            cumulative(layout.image_lengths[images]),
            chosen,
            *([] if window is None else [last_row_first_keys(layout, window)[chosen]]),
        )
        first = first_keys[0] if first_keys else None
        scored = ScoredRows(_num_scores(layout, images), of_query, starts, cu_scores, first)
        queries = self._queries.index_select(0, rows)
        return self._executor.cached_scores(self._stage, queries, block_table, kv_lengths, scored)

    def next(self, rows: Tensor, layout: Layout, images: IntArray) -> NextScores:
        """Of the next stage's first layer, whose keys are computed for all rows as they are: those that go on need
        them in any case."""
        owners = _owners(layout, images)
        window = self._executor.decoder.stages[self._stage + 1].first_layer.window
        of_query, starts, cu_scores, cu_seqlens, positions, last_rows, *first_keys = self._device.upload(
            owners,
            layout.image_starts[images] + layout.first_cache_rows[owners],
            cumulative(layout.image_lengths[images]),
            cumulative(layout.kv_lengths),
            layout.positions,
            layout.cu_seqlens[1:].astype(np.int64) - 1,
            *([] if window is None else [last_row_first_keys(layout, window)]),
        )
        first = first_keys[0] if first_keys else None
        scored = ScoredRows(_num_scores(layout, images), of_query, starts, cu_scores, first)
        inputs = NextLayerInputs(positions, last_rows, cu_seqlens, self._keys_in_cache(layout))
        return NextScores(*self._executor.next_scores(self._stage, rows[: layout.num_rows], inputs, scored))

    def _keys_in_cache(self, layout: Layout) -> KeysInCache | None:
        if not layout.first_cache_rows.any():
            return None
        (tables,) = self._device.upload(self._cache.block_tables(self._stage + 1, self._slots)[0])
        return KeysInCache(tables, layout.first_cache_rows, layout.lengths)


def _num_scores(layout: Layout, images: IntArray) -> int:
    return int(layout.image_lengths[images].sum())


def _owners(layout: Layout, images: IntArray) -> IntArray:
    """`[num_images]` the sequence that each image belongs to."""
    owners = np.searchsorted(layout.cu_images, images, side="right") - 1
    return owners.astype(np.int32)
