"""How much the last row of each prompt attends to the rows of its images, the scores of FastV and PyramidDrop.

FastV: arXiv 2403.06764; PyramidDrop: arXiv 2410.17247. Both take the softmax over all keys, text among them, in
float32, and average it over query heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.errors import KernelArgumentError
from dpn_rt.ops.checked import checked_op
from dpn_rt.ops.stream import stream_of


@checked_op
def last_row_scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    segment_queries: Tensor,
    segment_starts: Tensor,
    cu_scores: Tensor,
    *,
    scale: float,
    first_keys: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Mean over query heads of each visual row's weight in the softmax of a query over all keys of its sequence.

    Query i sees rows `cu_seqlens[i]` to `cu_seqlens[i + 1]` of `k`. Query head h reads key head
    `h * num_kv_heads // num_heads`. A segment is the visual rows of one image. Segment s has
    `cu_scores[s + 1] - cu_scores[s]` rows, each with a score; the first is row `segment_starts[s]` of the sequence of
    query `segment_queries[s]`. A query may have any number of segments. The keys of a query without one are not read.

    Args:
        q: `[num_queries, num_heads, head_dim]`, float32 or bfloat16, rotated; only the last dimension must be
            contiguous. head_dim is a multiple of 8 up to 256; on the GPU up to 128 for float32, and rows and heads
            start at multiples of 16 bytes.
        k: `[num_tokens, num_kv_heads, head_dim]`, rotated, dtype of `q`, last dimension contiguous; num_kv_heads
            divides num_heads.
        cu_seqlens: `[num_queries + 1]` int32.
        segment_queries: `[num_segments]` int32, in any order.
        segment_starts: `[num_segments]` int32 first row of each segment, relative to its sequence.
        cu_scores: `[num_segments + 1]` int32 first score of each segment, then `num_scores`.
        scale: of the products before softmax, positive.
        first_keys: `[num_queries]` int32, for attention with a sliding window: the first key of its sequence that each
            query sees, below the number of its keys. The keys before it have no part in the softmax, and the score 0.
            None: 0 for all.
        out: `[num_scores]` float32, contiguous, no memory shared with the other arguments. On the GPU the op does not
            know `num_scores`, so `out` must be given and may have more entries; those after the first `num_scores` are
            not written.

    Returns:
        `[num_scores]` float32, the scores of segment after segment.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device, layout or content; nothing was written.
    """
    num_tokens, num_kv_heads = k.shape[0], k.shape[1] if k.ndim == 3 else 0
    out = _output("last_row_scores", cu_scores, num_tokens) if out is None else out
    workspace = _workspace(q, num_kv_heads, num_tokens)
    segments = (segment_queries, segment_starts, cu_scores)
    _kernels.last_row_scores(out, q, k, cu_seqlens, *segments, first_keys, scale, workspace, stream_of(q))
    return out


@checked_op
def last_row_scores_paged(
    q: Tensor,
    blocks: Tensor,
    layer_in_block: int,
    block_table: Tensor,
    kv_lengths: Tensor,
    segment_queries: Tensor,
    segment_starts: Tensor,
    cu_scores: Tensor,
    *,
    scale: float,
    first_keys: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `last_row_scores`, over the keys that the paged cache holds.

    Cache row r of query i is row `r % block_size` of block `block_table[i, r // block_size]`. Rows 0 to
    `kv_lengths[i] - 1` are seen.

    Args:
        q: `[num_queries, num_heads, head_dim]` as in `last_row_scores`.
        blocks: `[num_blocks, layers_per_block, 2, num_kv_heads, block_size, head_dim]`, contiguous, dtype of `q`; index
            0 of the third dimension holds rotated keys. num_kv_heads divides num_heads.
        layer_in_block: the layer to read, below layers_per_block.
        block_table: `[num_queries, max_blocks]` int32; entries after those that a query uses are not read.
        kv_lengths: `[num_queries]` int32, keys that each query sees: 0 to `max_blocks * block_size`.
        segment_queries: `[num_segments]` int32, in any order.
        segment_starts: `[num_segments]` int32 first cache row of each segment.
        cu_scores: `[num_segments + 1]` int32 first score of each segment, then `num_scores`.
        scale: of the products before softmax, positive.
        first_keys: as in `last_row_scores`.
        out: as in `last_row_scores`.

    Returns:
        `[num_scores]` float32, the scores of segment after segment.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device, layout or content; nothing was written.
    """
    num_kv_heads, block_size = blocks.shape[3:5] if blocks.ndim == 6 else (0, 0)
    most_keys = block_table.shape[-1] * block_size
    out = _output("last_row_scores_paged", cu_scores, most_keys) if out is None else out
    workspace = _workspace(q, num_kv_heads, most_keys)
    segments = (segment_queries, segment_starts, cu_scores)
    _kernels.last_row_scores_paged(
        out, q, blocks, layer_in_block, block_table, kv_lengths, *segments, first_keys, scale, workspace, stream_of(q)
    )
    return out


def _output(op: str, cu_scores: Tensor, most_keys: int) -> Tensor:
    """most_keys: that one query sees."""
    if cu_scores.is_cuda:
        raise KernelArgumentError(f"{op}: out is None, expected [num_scores] float32 on {cu_scores.device}")
    num_scores, most = _kernels.packed_size(op, "cu_scores", cu_scores), (cu_scores.shape[0] - 1) * most_keys
    if num_scores > most:
        raise KernelArgumentError(
            f"{op}: cu_scores ends at {num_scores}, expected at most {most}: all keys, per segment"
        )
    return torch.empty(num_scores, dtype=torch.float32, device="cpu")


def _workspace(q: Tensor, num_kv_heads: int, most_keys: int) -> Tensor | None:
    if not q.is_cuda:
        return None
    size = _kernels.last_row_scores_workspace_size(q, num_kv_heads, most_keys)
    return torch.empty(size, dtype=torch.float32, device=q.device)
