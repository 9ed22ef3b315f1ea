"""The executor of one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.backends.kernels.executor import DecodeInputs, KeysInCache, NextLayerInputs, ScoredRows
from dpn_rt.cache.kv_pool import KvPool
from dpn_rt.device.device import Device
from dpn_rt.model.decoder import Decoder
from dpn_rt.model.stage_batch import StageBatch


class LocalExecutor:
    """An `Executor` in this process: of a whole decoder, or of one rank's part."""

    def __init__(self, decoder: Decoder, pool: KvPool, device: Device) -> None:
        self.decoder, self.pool, self._device = decoder, pool, device
        self.embed, self.logits, self.copy_blocks = decoder.embed, decoder.logits, pool.copy

    def run(self, stage: int, x: Tensor, batch: StageBatch) -> Tensor:
        """See `Executor`."""
        return self.decoder.stages[stage].forward(x, batch, self.pool.blocks, self.pool.positions)

    def decode(self, token_ids: Tensor, inputs: DecodeInputs) -> Tensor:
        """See `Executor`."""
        return self.decoder.decode(
            self.decoder.embed(token_ids),
            inputs.positions,
            inputs.cache_rows,
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
        own = self.decoder.own_heads(queries)
        keys = self.pool.blocks, layer_in_block, block_table, kv_lengths
        return self._scores(ops.last_row_scores_paged, own, keys, scored)

    def next_scores(
        self, stage: int, rows: Tensor, inputs: NextLayerInputs, scored: ScoredRows
    ) -> tuple[Tensor, Tensor | None]:
        """See `Executor`. A rank has the keys of its own heads alone: then the layer computes them again."""
        attention = self.decoder.next_attention(stage, rows, inputs.positions, inputs.last_rows)
        keys = attention.keys if inputs.cached is None else self._with_cached(attention.keys, inputs.cached)
        scores = self._scores(ops.last_row_scores, attention.queries, (keys, inputs.cu_seqlens), scored)
        return scores, None if self.decoder.is_shared else attention.plain_keys

    def close(self) -> None:
        """There are no other processes."""

    def _scores(
        self, op: Callable[..., Tensor], queries: Tensor, keys: tuple[Tensor | int, ...], scored: ScoredRows
    ) -> Tensor:
        """`[num_scores]` float32, mean over the heads of all ranks; `keys` are what `op` is told of keys."""
        scores = op(
            queries,
            *keys,
            scored.of_query,
            scored.starts,
            scored.cu_scores,
            scale=self.decoder.scale,
            first_keys=scored.first_keys,
            out=torch.empty(scored.num_scores, dtype=torch.float32, device=self._device.torch_device),
        )
        return self.decoder.mean_of_ranks(scores)

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
