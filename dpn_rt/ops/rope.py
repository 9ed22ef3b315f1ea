"""Rotary position embedding, fused with the store of keys and values into the paged cache."""

from __future__ import annotations

from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.ops.checked import checked_op
from dpn_rt.ops.stream import stream_of


@checked_op
def rope_store(
    qkv: Tensor,
    positions: Tensor,
    cache_rows: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    layer_in_block: int,
    block_table: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> None:
    """Rotate queries and keys in place, then write keys and values to the cache.

    Half-split rotation: element i of a head and element i + head_dim / 2 turn together by the angle of column i, in
    float32, rounded once. Keys and values of row t of sequence b go to row `cache_rows[t] % block_size` of the block
    `block_table[b, cache_rows[t] // block_size]`. Position and cache row differ where rows before them were dropped
    and the others kept their positions.

    Args:
        qkv: `[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]`, float32 or bfloat16: query heads, key heads,
            value heads; rows may be strided.
        positions: `[num_tokens]` int32 rotary position of each row, from 0 to `max_positions - 1`.
        cache_rows: `[num_tokens]` int32 row of its sequence's KV cache that each row is stored in, from 0 to
            `max_blocks * block_size - 1`; no two rows of a sequence in the same one.
        cos_sin: `[max_positions, head_dim]` float32: head_dim / 2 cosines, then as many sines.
        kv_cache: `[num_blocks, layers_per_block, 2, num_kv_heads, block_size, head_dim]`, dtype of `qkv`; index 0 of
            the third dimension holds keys, index 1 values.
        layer_in_block: which of the block's layers is written.
        block_table: `[num_seqs, max_blocks]` int32; entries that no cache row uses may hold anything.
        cu_seqlens: `[num_seqs + 1]` int32, first row of every sequence in `qkv`, then `num_tokens`.
        num_heads: a multiple of `num_kv_heads`.
        num_kv_heads: at least 1.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, layout or content; nothing was written.
    """
    _kernels.rope_store(
        qkv,
        positions,
        cache_rows,
        cos_sin,
        kv_cache,
        layer_in_block,
        block_table,
        cu_seqlens,
        num_heads,
        num_kv_heads,
        stream_of(qkv),
    )
