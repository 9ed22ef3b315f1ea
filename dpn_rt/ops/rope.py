"""Rotary position embedding, fused with a norm of heads before it and with storing keys and values in the cache."""

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
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate queries and keys in place, then write keys and values to the cache.

    Elements i and i + head_dim / 2 of a head are a pair that is rotated by the angle of column i (half-split rotation),
    in float32 and rounded once. Keys and values of row t of sequence b are stored in row `cache_rows[t] % block_size`
    of the block `block_table[b, cache_rows[t] // block_size]`. A row's position and cache row differ where earlier rows
    were dropped and the remaining ones kept their positions.

    With `q_norm` and `k_norm` every head of queries and keys is first divided by its root mean square,
    sqrt(mean(x^2) + eps), and multiplied by the weight, as in Qwen3.

    Args:
        qkv: `[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]`, float32 or bfloat16: query heads, key heads,
            value heads; rows may be strided.
        positions: `[num_tokens]` int32 rotary position of each row, from 0 to `max_positions - 1`.
        cache_rows: `[num_tokens]` int32 row of the sequence's KV cache that each row is stored in, from 0 to
            `max_blocks * block_size - 1`; all different within a sequence.
        cos_sin: `[max_positions, head_dim]` float32: head_dim / 2 cosines, then head_dim / 2 sines.
        kv_cache: `[num_blocks, layers_per_block, 2, num_kv_heads, block_size, head_dim]`, dtype of `qkv`; index 0 of
            the third dimension holds keys, index 1 values.
        layer_in_block: the layer to write, below layers_per_block.
        block_table: `[num_seqs, max_blocks]` int32; entries that no cache row uses may have any value.
        cu_seqlens: `[num_seqs + 1]` int32, first row of every sequence in `qkv`, then the end of the last one. Rows
            behind it are left alone.
        num_heads: a multiple of `num_kv_heads`.
        num_kv_heads: at least 1.
        q_norm: `[head_dim]` weight of the norm of each query head, dtype of `qkv`; None: no norm.
        k_norm: `[head_dim]` of each key head; given together with `q_norm`. On the GPU with head_dim up to 512.
        eps: of both norms, at least 0.

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
        q_norm,
        k_norm,
        eps,
        stream_of(qkv),
    )
