"""The pooling of a boundary: fewer visual rows per sequence, each by its own expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.errors import KernelArgumentError
from dpn_rt.ops.checked import face
from dpn_rt.ops.stream import stream_of


@face
def pool(
    x: Tensor,
    cu_seqlens: Tensor,
    image_start: Tensor,
    grids: Tensor,
    experts: Tensor,
    kernels: Tensor,
    out_cu_seqlens: Tensor,
    scales: Tensor | None = None,
    function: Literal["max", "avg", "conv"] = "max",
    conv_weights: Sequence[Tensor] | None = None,
    *,
    lengths: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Pack text rows and pooled visual rows of every sequence into the layout of the next stage, in one pass.

    The visual rows of sequence b are the grid `grids[b]`, row-major, from row `image_start[b]` of that sequence on,
    which is row `cu_seqlens[b] + image_start[b]` of `x`. They are pooled by the kernel of expert `experts[b]`, stride =
    kernel, no padding, trailing rows and columns dropped, and multiplied by `scales[b]` (float32, rounded once); a 1x1
    expert scales as well. Text rows are copied bit by bit, and so is all of a sequence whose expert is -1.

    Args:
        x: `[num_tokens, hidden_size]`, float32 or bfloat16; rows may be strided.
        cu_seqlens: `[num_seqs + 1]` int32.
        image_start: `[num_seqs]` int32, relative to the sequence; not read where the expert is -1.
        grids: `[num_seqs, 2]` int32, height and width; not read where the expert is -1.
        experts: `[num_seqs]` int32 in `[-1, num_experts)`; -1 for a sequence without image or one that skips.
        kernels: `[num_experts, 2]` int32, height and width, at least 1.
        out_cu_seqlens: `[num_seqs + 1]` int32, what the experts make of `cu_seqlens`.
        scales: `[num_seqs]` float32.
        function: `max` (NaN wins, as in torch), `avg`, or `conv` (depthwise).
        conv_weights: for `conv`, one `[kernel height * kernel width, hidden_size]` per expert, dtype of `x`.
        lengths: `[num_seqs]` int32, for sequences that have room behind them, as in a padded batch: the rows that each
            has, from its offset in `cu_seqlens` on. `out_cu_seqlens` may then leave room as well, which is zeroed.
            None: every sequence reaches to the next. Asks for `out`.
        out: `[num_out_tokens, hidden_size]`, contiguous, no memory shared with the other arguments. On the GPU, where
            the number of rows is not known to the host, it may have more: those are not written, and without `out`
            there are `num_tokens`.

    Returns:
        `[num_out_tokens, hidden_size]`.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device, layout or content; nothing was written.
    """
    if out is None and lengths is not None:
        raise KernelArgumentError("pool: lengths without out: expected out, with the rows that out_cu_seqlens gives")
    if out is None and x.is_cuda:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    elif out is None:
        num_out_tokens = _kernels.pool_num_out_tokens(out_cu_seqlens)
        if num_out_tokens > x.shape[0]:
            raise KernelArgumentError(
                f"pool: out_cu_seqlens ends at {num_out_tokens}, expected at most num_tokens={x.shape[0]}"
            )
        out = x.new_empty(num_out_tokens, x.shape[-1])
    _kernels.pool(
        out,
        x,
        cu_seqlens,
        image_start,
        grids,
        experts,
        kernels,
        out_cu_seqlens,
        scales,
        lengths,
        function,
        conv_weights,
        stream_of(x),
    )
    return out
