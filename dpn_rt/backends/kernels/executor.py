"""What the backend asks of decoder and KV blocks: here (`local_executor.py`), or on all ranks (`parallel/`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dpn_rt.cache.block_allocator import BlockIds
from dpn_rt.cache.kv_pool import KvPool
from dpn_rt.model.decoder import Decoder
from dpn_rt.model.layout import IntArray
from dpn_rt.model.stage_batch import StageBatch


@dataclass(frozen=True, eq=False)
class DecodeInputs:
    """Where the new rows of a decode step stand, see `Decoder.decode`."""

    positions: Tensor
    """`[num_stages, num_seqs]` int32."""
    cache_rows: Tensor
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
        """Of this process: what its stages are like."""

    @property
    def pool(self) -> KvPool:
        """Of this process."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """See `Decoder.embed`."""

    def run(self, stage: int, x: Tensor, batch: StageBatch) -> Tensor:
        """Rows `[num_rows, hidden_size]` through a stage, see `Stage.forward`."""

    def logits(self, x: Tensor) -> Tensor:
        """See `Decoder.logits`."""

    def decode(self, token_ids: Tensor, inputs: DecodeInputs) -> Tensor:
        """`[num_seqs]` ids of the new rows, embedded and through all stages, see `Decoder.decode`."""

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
