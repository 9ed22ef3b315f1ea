"""Attention of last prompt rows to visual rows: what ranks them for reducers, from the cache or ahead of a stage."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.cache.block_allocator import BlockAllocator, Slots
from dpn_rt.cache.kv_pool import KvPool
from dpn_rt.device.device import Device
from dpn_rt.model.decoder import Decoder
from dpn_rt.model.layout import IntArray, Layout, cumulative
from dpn_rt.model.reduction.reducer import NextScores
from dpn_rt.model.windows import last_row_first_keys


class KernelScores:
    """`AttentionScores` at the end of one stage."""

    def __init__(
        self,
        decoder: Decoder,
        stage: int,
        queries: Tensor | None,
        cache: BlockAllocator,
        pool: KvPool,
        slots: Slots,
        device: Device,
    ) -> None:
        """
        Args:
            decoder: of the engine.
            stage: that has ended.
            queries: `[num_seqs, num_heads, head_dim]` see `StageRun`.
            cache: of the sequences.
            pool: of keys and values.
            slots: `[num_seqs]` of the layout's sequences.
            device: of all tensors.
        """
        self._decoder, self._stage, self._queries = decoder, stage, queries
        self._cache, self._pool, self._slots, self._device = cache, pool, slots, device

    def here(self, layout: Layout, images: IntArray) -> Tensor:
        """Of the stage's last layer, whose rotated keys are in the cache."""
        assert self._queries is not None, "the stage was asked for its queries"
        chosen, segments = np.unique(_owners(layout, images), return_inverse=True)
        group, layer_in_block = self._decoder.stages[self._stage].last_layer_place
        tables = self._cache.block_tables(self._stage, self._slots[chosen])[group]
        first_rows = layout.first_cache_rows[chosen]
        window = self._decoder.stages[self._stage].last_layer.window
        block_table, kv_lengths, of_query, starts, cu_scores, rows, *first_keys = self._device.upload(
            np.ascontiguousarray(tables),
            layout.kv_lengths[chosen],
            segments.astype(np.int32),
            layout.image_starts[images] + first_rows[segments],
            cumulative(layout.image_lengths[images]),
            chosen,
            *([] if window is None else [last_row_first_keys(layout, window)[chosen]]),
        )
        return ops.last_row_scores_paged(
            self._queries.index_select(0, rows),
            self._pool.blocks,
            layer_in_block,
            block_table,
            kv_lengths,
            of_query,
            starts,
            cu_scores,
            scale=self._decoder.scale,
            first_keys=first_keys[0] if first_keys else None,
            out=self._scores_out(layout, images),
        )

    def next(self, rows: Tensor, layout: Layout, images: IntArray) -> NextScores:
        """Of the next stage's first layer, whose keys are computed for all rows as they are: those that go on need
        them in any case."""
        owners = _owners(layout, images)
        window = self._decoder.stages[self._stage + 1].first_layer.window
        of_query, starts, cu_scores, cu_seqlens, positions, last_rows, *first_keys = self._device.upload(
            owners,
            layout.image_starts[images] + layout.first_cache_rows[owners],
            cumulative(layout.image_lengths[images]),
            cumulative(layout.kv_lengths),
            layout.positions,
            layout.cu_seqlens[1:].astype(np.int64) - 1,
            *([] if window is None else [last_row_first_keys(layout, window)]),
        )
        attention = self._decoder.next_attention(self._stage, rows[: layout.num_rows], positions, last_rows)
        scores = ops.last_row_scores(
            attention.queries,
            self._with_cached_keys(attention.keys, layout),
            cu_seqlens,
            of_query,
            starts,
            cu_scores,
            scale=self._decoder.scale,
            first_keys=first_keys[0] if first_keys else None,
            out=self._scores_out(layout, images),
        )
        return NextScores(scores, attention.plain_keys)

    def _scores_out(self, layout: Layout, images: IntArray) -> Tensor:
        count = int(layout.image_lengths[images].sum())
        return torch.empty(count, dtype=torch.float32, device=self._device.torch_device)

    def _with_cached_keys(self, keys: Tensor, layout: Layout) -> Tensor:
        """Keys of all rows: those of a cached prefix are in the next stage's cache already."""
        if not layout.first_cache_rows.any():
            return keys
        parts: list[Tensor] = []
        tables = self._cache.block_tables(self._stage + 1, self._slots)[0]
        counts, computed = layout.first_cache_rows.tolist(), torch.split(keys, layout.lengths.tolist())
        for index, (count, own) in enumerate(zip(counts, computed, strict=True)):
            parts += [self._cached_keys(tables[index], count), own] if count else [own]
        return torch.cat(parts)

    def _cached_keys(self, table: IntArray, count: int) -> Tensor:
        """`[count, num_kv_heads, head_dim]` of the first rows of a sequence, in the first layer of the next stage."""
        blocks = self._pool.blocks
        block_size = blocks.shape[4]
        (ids,) = self._device.upload(table[: -(-count // block_size)].astype(np.int64))
        keys = blocks[:, 0, 0].index_select(0, ids)  # [num_blocks, num_kv_heads, block_size, head_dim]
        return keys.transpose(1, 2).flatten(0, 1)[:count]


def _owners(layout: Layout, images: IntArray) -> IntArray:
    """`[num_images]` the sequence that each image belongs to."""
    owners = np.searchsorted(layout.cu_images, images, side="right") - 1
    return owners.astype(np.int32)
