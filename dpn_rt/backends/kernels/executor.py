"""What the backend asks of decoder and KV blocks. In this process, or in all ranks of an engine (`parallel/`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.cache.block_allocator import BlockIds
from dpn_rt.cache.kv_pool import KvPool
from dpn_rt.device.device import Device
from dpn_rt.model.decoder import Decoder
from dpn_rt.model.layout import IntArray
from dpn_rt.model.stage_batch import StageBatch


@dataclass(frozen=True, eq=False)
class DecodeInputs:
    """Where the new rows of a decode step stand, see `Decoder.decode`."""

    positions: Tensor
    """`[num_stages, num_seqs]` int32."""
    kv_lengths: Tensor
    """`[num_stages, num_seqs]` int32."""
    block_tables: Sequence[Tensor]
    """Per stage `[groups, num_seqs, max_blocks]` int32."""
    cu_seqlens: Tensor
    """`[num_seqs + 1]` int32."""


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """Rows whose attention is asked for, see `ops.last_row_scores`."""

    num_scores: int
    of_query: Tensor
    """`[num_images]` int32."""
    starts: Tensor
    """`[num_images]` int32."""
    cu_scores: Tensor
    """`[num_images + 1]` int32."""
    first_keys: Tensor | None
    """`[num_queries]` int32; None: the layer has no window."""


@dataclass(frozen=True, eq=False)
class KeysInCache:
    """Keys of a layer that a cached prefix has."""

    tables: Tensor
    """`[num_seqs, max_blocks]` int32 KV blocks."""
    counts: IntArray
    """`[num_seqs]` rows of each sequence that are cached."""
    lengths: IntArray
    """`[num_seqs]` rows after them, which are not."""


@dataclass(frozen=True, eq=False)
class NextLayerInputs:
    """What attention in the layer after a boundary would read, see `Decoder.next_attention`."""

    positions: Tensor
    """`[num_rows]` int32."""
    last_rows: Tensor
    """`[num_queries]` int64."""
    cu_seqlens: Tensor
    """`[num_seqs + 1]` int32 offsets of each sequence's keys, cached ones included."""
    cached: KeysInCache | None


class Executor(Protocol):
    """The decoder's stages and their KV blocks."""

    @property
    def decoder(self) -> Decoder:
        """Of this process: embeddings, and what a stage is like."""

    @property
    def pool(self) -> KvPool:
        """Of this process."""

    def run(self, stage: int, x: Tensor, batch: StageBatch) -> Tensor:
        """Rows `[num_rows, hidden_size]` through a stage, see `Stage.forward`."""

    def logits(self, x: Tensor) -> Tensor:
        """See `Decoder.logits`."""

    def decode(self, x: Tensor, inputs: DecodeInputs) -> Tensor:
        """See `Decoder.decode`."""

    def cached_scores(
        self, stage: int, queries: Tensor, block_table: Tensor, kv_lengths: Tensor, scored: ScoredRows
    ) -> Tensor:
        """Attention in a stage's last layer, whose keys are in the cache.

        Args:
            stage: that has ended.
            queries: `[num_queries, num_heads, head_dim]` rotated, of the heads of all ranks.
            block_table: `[num_queries, max_blocks]` int32.
            kv_lengths: `[num_queries]` int32.
            scored: what is asked for.

        Returns:
            `[num_scores]` float32, mean over all heads.
        """

    def next_scores(
        self, stage: int, rows: Tensor, inputs: NextLayerInputs, scored: ScoredRows
    ) -> tuple[Tensor, Tensor | None]:
        """Attention as it would be in the first layer after a stage.

        Args:
            stage: that has ended.
            rows: `[num_rows, hidden_size]` that leave it.
            inputs: where they stand.
            scored: what is asked for.

        Returns:
            `[num_scores]` float32, mean over all heads; and the layer's keys, see `NextScores`.
        """

    def copy_blocks(self, sources: BlockIds, targets: BlockIds) -> None:
        """See `KvPool.copy`."""

    def close(self) -> None:
        """Ends processes that were started, if there are any. Nothing can be run after that."""


class LocalExecutor:
    """An `Executor` in this process: of a whole decoder, or of one rank's part."""

    def __init__(self, decoder: Decoder, pool: KvPool, device: Device) -> None:
        self.decoder, self.pool, self._device = decoder, pool, device
        self.logits, self.copy_blocks = decoder.logits, pool.copy

    def run(self, stage: int, x: Tensor, batch: StageBatch) -> Tensor:
        """See `Executor`."""
        return self.decoder.stages[stage].forward(x, batch, self.pool.blocks, self.pool.positions)

    def decode(self, x: Tensor, inputs: DecodeInputs) -> Tensor:
        """See `Executor`."""
        return self.decoder.decode(
            x,
            inputs.positions,
            inputs.kv_lengths,
            inputs.block_tables,
            inputs.cu_seqlens,
            self.pool.blocks,
            self.pool.positions,
        )

    def cached_scores(
        self, stage: int, queries: Tensor, block_table: Tensor, kv_lengths: Tensor, scored: ScoredRows
    ) -> Tensor:
        """See `Executor`."""
        _, layer_in_block = self.decoder.stages[stage].last_layer_place
        scores = ops.last_row_scores_paged(
            self.decoder.own_heads(queries),
            self.pool.blocks,
            layer_in_block,
            block_table,
            kv_lengths,
            scored.of_query,
            scored.starts,
            scored.cu_scores,
            scale=self.decoder.scale,
            first_keys=scored.first_keys,
            out=self._scores_out(scored),
        )
        return self.decoder.mean_of_ranks(scores)

    def next_scores(
        self, stage: int, rows: Tensor, inputs: NextLayerInputs, scored: ScoredRows
    ) -> tuple[Tensor, Tensor | None]:
        """See `Executor`. A rank has the keys of its own heads alone: then the layer computes them again."""
        attention = self.decoder.next_attention(stage, rows, inputs.positions, inputs.last_rows)
        keys = attention.keys if inputs.cached is None else self._with_cached(attention.keys, inputs.cached)
        scores = ops.last_row_scores(
            attention.queries,
            keys,
            inputs.cu_seqlens,
            scored.of_query,
            scored.starts,
            scored.cu_scores,
            scale=self.decoder.scale,
            first_keys=scored.first_keys,
            out=self._scores_out(scored),
        )
        return self.decoder.mean_of_ranks(scores), None if self.decoder.is_shared else attention.plain_keys

    def close(self) -> None:
        """There are no other processes."""

    def _scores_out(self, scored: ScoredRows) -> Tensor:
        return torch.empty(scored.num_scores, dtype=torch.float32, device=self._device.torch_device)

    def _with_cached(self, keys: Tensor, cached: KeysInCache) -> Tensor:
        """Keys of all rows: those of a cached prefix are in the next stage's cache already."""
        parts: list[Tensor] = []
        computed = torch.split(keys, cached.lengths.tolist())
        for table, count, own in zip(cached.tables, cached.counts.tolist(), computed, strict=True):
            parts += [self._cached_keys(table, count), own] if count else [own]
        return torch.cat(parts)

    def _cached_keys(self, table: Tensor, count: int) -> Tensor:
        """`[count, num_kv_heads, head_dim]` of the first rows of a sequence, in the first layer of the next stage."""
        blocks = self.pool.blocks
        block_size = blocks.shape[4]
        keys = blocks[:, 0, 0].index_select(
            0, table[: -(-count // block_size)]
        )  # [num_blocks, num_kv_heads, block_size, head_dim]
        return keys.transpose(1, 2).flatten(0, 1)[:count]
