"""What a stage and its layers are told of a batch, and what a layer says of its attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StageBatch:
    """Where the rows of a batch stand in one stage."""

    cu_seqlens: Tensor
    """`[num_seqs + 1]` int32 offsets of each sequence's rows."""
    positions: Tensor
    """`[num_rows]` int32 rotary position of each row."""
    cache_rows: Tensor
    """`[num_rows]` int32 row of its sequence's KV cache that each row is stored in."""
    context_lens: Tensor
    """`[num_seqs]` int32 rows in the cache, the new ones included."""
    block_tables: Tensor
    """`[groups, num_seqs, max_blocks]` int32 KV blocks of each sequence."""
    last_rows: Tensor | None
    """`[num_ends]` int64 last row of each sequence that ends in this batch; None when each has one row (decoding)."""
    last_seqs: Tensor | None = None
    """`[num_ends]` int64 which sequences these are; None for all."""
    queries_out: Tensor | None = None
    """`[num_ends, num_heads, head_dim]` filled with the rotated queries of `last_rows` in the stage's last layer; None:
    nothing reads them."""
    keys: Tensor | None = None
    """`[num_rows, num_kv_heads * head_dim]` keys of the rows in the stage's first layer, not rotated, where the
    boundary before it has computed them already."""
    extends: bool = False
    """Whether rows before these are in the cache: attention then reads all of them there."""

    @property
    def is_decode(self) -> bool:
        return self.last_rows is None


@dataclass(frozen=True, eq=False)
class NextAttention:
    """What attention of some rows would read in the layer after a boundary."""

    queries: Tensor
    """`[num_queries, num_heads, head_dim]` rotated."""
    keys: Tensor
    """`[num_rows, num_kv_heads, head_dim]` rotated."""
    plain_keys: Tensor
    """`[num_rows, num_kv_heads * head_dim]` not rotated, as `StageBatch.keys`."""


@dataclass(frozen=True)
class CacheView:
    """The KV blocks that a layer reads and writes."""

    blocks: Tensor
    """`[num_blocks, layers_per_block, 2, num_kv_heads, block_size, head_dim]`."""
    layer_in_block: int
    block_table: Tensor
    """`[num_seqs, max_blocks]` int32."""
    first_keys: Tensor | None = None
    """`[num_rows]` int32 first cache row that each row of the batch sees; None: the layer has no window."""
