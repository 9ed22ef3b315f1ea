"""Softmax attention over packed sequences and over the paged KV cache, with grouped-query heads.

Which rows a row sees depends only on the order of the rows in the packed batch or in the cache. It does not depend on
rotary positions, which `rope_store` has already applied to queries and keys. A sliding window is given as the first key
that each row sees, since the rows of a window are consecutive wherever rows were left out.

Each function raises `KernelArgumentError` where an argument has the wrong shape, dtype, device, layout or content.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.ops.checked import checked_op
from dpn_rt.ops.stream import stream_of

HEAD_DIMS = range(8, 257, 8)
"""Head sizes that attention takes on a CPU."""
CUDA_HEAD_DIMS: tuple[int, ...] = _kernels.cuda_head_dims
"""Head sizes that attention takes on a CUDA device: the build's option DPN_RT_HEAD_DIMS."""


@checked_op
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool,
    scale: float,
    first_keys: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of every sequence over its own rows; query head h reads key/value head `h * num_kv_heads // num_heads`.

    Scores, softmax and sums are float32. For bfloat16 inputs the softmax weights are rounded to bfloat16 on processors
    that can multiply bfloat16.

    Args:
        q: `[num_tokens, num_heads, head_dim]`, float32 or bfloat16. q, k and v may be views of one fused buffer: only
            the last dimension must be contiguous. head_dim is a multiple of 8 up to 256; on the GPU 16, 32, 64, 96 or
            128, and rows and heads start at multiples of 16 bytes.
        k: `[num_tokens, num_kv_heads, head_dim]`, dtype of `q`; num_kv_heads divides num_heads.
        v: `[num_tokens, num_kv_heads, head_dim]`, dtype of `q`.
        cu_seqlens: `[num_seqs + 1]`, int32; sequence s has the rows from `cu_seqlens[s]` up to, not including,
            `cu_seqlens[s + 1]`; it may be empty. Rows behind the last sequence are left alone.
        causal: whether row i of a sequence sees only rows up to i.
        scale: of the scores before softmax, positive.
        first_keys: `[num_tokens]`, int32, for attention with a sliding window: the first key of its sequence that each
            row sees, from 0 to the row's own; it never falls within a sequence. None: key 0 for
            all. Only with `causal`.
        out: `[num_tokens, num_heads * head_dim]`, contiguous, no memory shared with the inputs.

    Returns:
        `[num_tokens, num_heads * head_dim]`.
    """
    out = _empty_output(q) if out is None else out
    _kernels.attention(out, q, k, v, cu_seqlens, first_keys, causal, scale, stream_of(q))
    return out


@checked_op
def attention_extend(
    q: Tensor,
    kv_cache: Tensor,
    layer_in_block: int,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    first_keys: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of the new rows of every sequence over all rows of the sequence in the paged cache.

    For a prefill whose first rows are cached. Call `rope_store` before: the keys and values of the new rows must be in
    the last cache rows of the sequence, which end at `context_lens[s] - 1`. Each new row sees the cache rows up to its
    own.

    Args:
        q: `[num_tokens, num_heads, head_dim]`, float32 or bfloat16, last dimension contiguous: the new rows, packed.
        kv_cache: as in `attention_decode`.
        layer_in_block: the layer to read, below layers_per_block.
        block_table: `[num_seqs, max_blocks]`, int32; entries after those that a sequence uses are not read.
        cu_seqlens: `[num_seqs + 1]`, int32; sequence s has the rows `cu_seqlens[s]` to `cu_seqlens[s + 1] - 1` of `q`.
            Rows behind the last sequence are left alone.
        context_lens: `[num_seqs]`, int32 rows of each sequence in the cache, at least 1 and at least the new ones.
        scale: of the scores before softmax, positive.
        first_keys: `[num_tokens]`, int32, for attention with a sliding window: the first cache row of its sequence
            that each row sees, from 0 to the row's own; it never falls within a sequence. None: 0 for all.
        out: `[num_tokens, num_heads * head_dim]`, contiguous, no memory shared with `q` or `kv_cache`.

    Returns:
        `[num_tokens, num_heads * head_dim]`.
    """
    out = _empty_output(q) if out is None else out
    stream = stream_of(q)
    _kernels.attention_extend(
        out, q, kv_cache, layer_in_block, block_table, cu_seqlens, context_lens, first_keys, scale, stream
    )
    return out


@checked_op
def attention_decode(
    q: Tensor,
    kv_cache: Tensor,
    layer_in_block: int,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    first_keys: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one row per sequence over the rows that the paged cache holds for it.

    Cache row r of sequence s is row `r % block_size` of block `block_table[s, r // block_size]`. Rows 0 to
    `context_lens[s] - 1` are seen.

    Args:
        q: `[num_seqs, num_heads, head_dim]`, float32 or bfloat16, last dimension contiguous. head_dim is a multiple of
            8 up to 256; on the GPU 16, 32, 64, 96 or 128.
        kv_cache: `[num_blocks, layers_per_block, 2, num_kv_heads, block_size, head_dim]`, contiguous, dtype of `q`;
            index 0 of the third dimension holds keys, index 1 values. num_kv_heads divides num_heads.
        layer_in_block: the layer to read, below layers_per_block.
        block_table: `[num_seqs, max_blocks]`, int32; entries after those that a sequence uses are not read.
        context_lens: `[num_seqs]`, int32 rows that each sequence sees, 1 to `max_blocks * block_size`.
        scale: of the scores before softmax, positive.
        first_keys: `[num_seqs]`, int32, for attention with a sliding window: the first cache row that is seen, 0 to
            `context_lens[s] - 1`. None: 0 for all.
        out: `[num_seqs, num_heads * head_dim]`, contiguous, no memory shared with `q` or `kv_cache`.

    Returns:
        `[num_seqs, num_heads * head_dim]`.
    """
    out = _empty_output(q) if out is None else out
    stream, workspace = 0, None
    if q.is_cuda:
        stream = stream_of(q)
        if size := _kernels.attention_decode_workspace_size(q, kv_cache, block_table):
            workspace = torch.empty(size, dtype=torch.float32, device=q.device)
    _kernels.attention_decode(
        out, q, kv_cache, layer_in_block, block_table, context_lens, first_keys, scale, workspace, stream
    )
    return out


def _empty_output(q: Tensor) -> Tensor:
    # For a q of another rank the shape is wrong; the kernel's checks then refuse q with a message.
    return q.new_empty(q.shape[0], q.shape[1:].numel()) if q.ndim else q.new_empty(0)
