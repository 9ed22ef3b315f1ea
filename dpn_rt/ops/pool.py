"""The pooling of a boundary: reduces the visual rows of every image by its own expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.errors import KernelArgumentError
from dpn_rt.ops.checked import checked_op
from dpn_rt.ops.stream import stream_of


@checked_op
def pool(
    x: Tensor,
    cu_seqlens: Tensor,
    cu_images: Tensor,
    image_starts: Tensor,
    grids: Tensor,
    experts: Tensor,
    kernels: Tensor,
    out_cu_seqlens: Tensor,
    scales: Tensor | None = None,
    function: Literal["max", "avg", "conv"] = "max",
    conv_weights: Sequence[Tensor] | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Pack text rows and pooled visual rows of every sequence into the layout of the next stage, in one pass.

    Sequence b has the images `cu_images[b]` to `cu_images[b + 1] - 1`, any number of them. The visual rows of its image
    i are the grid `grids[i]` in row-major order. The first of them is row `image_starts[i]` of the sequence, which is
    row `cu_seqlens[b] + image_starts[i]` of `x`.

    The kernel of expert `experts[i]` pools these rows: its stride equals its size, there is no padding, and trailing
    rows and columns are dropped. The result is multiplied by `scales[i]` (in float32, rounded once), also for a 1x1
    expert. Text rows, and the rows of an image whose expert is -1, are copied bit by bit.

    Args:
        x: `[num_tokens, hidden_size]`, float32 or bfloat16; rows may be strided.
        cu_seqlens: `[num_seqs + 1]` int32.
        cu_images: `[num_seqs + 1]` int32, first image of every sequence, then `num_images`.
        image_starts: `[num_images]` int32 first visual row of each image, relative to its sequence. The images of a
            sequence are in the order of their rows and do not overlap.
        grids: `[num_images, 2]` int32, height and width.
        experts: `[num_images]` int32 in `[-1, num_experts)`; -1 for an image that stays as it is.
        kernels: `[num_experts, 2]` int32, height and width, at least 1.
        out_cu_seqlens: `[num_seqs + 1]` int32, `cu_seqlens` after the pooling.
        scales: `[num_images]` float32; None: 1.
        function: `max` (NaN wins, as in torch), `avg`, or `conv` (depthwise).
        conv_weights: for `conv`, one `[kernel height * kernel width, hidden_size]` per expert, dtype of `x`.
        out: `[num_out_tokens, hidden_size]`, contiguous, no memory shared with the other arguments. On the GPU the host
            does not know `num_out_tokens`, so `out` may have more rows; the rows after the first `num_out_tokens` are
            not written.

    Returns:
        `[num_out_tokens, hidden_size]`. On the GPU it is `out`; without `out` it has `num_tokens` rows.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device, layout or content; nothing was written.
    """
    if out is None and x.is_cuda:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    elif out is None:
        num_out_tokens = _kernels.packed_size("pool", "out_cu_seqlens", out_cu_seqlens)
        if num_out_tokens > x.shape[0]:
            raise KernelArgumentError(
                f"pool: out_cu_seqlens ends at {num_out_tokens}, expected at most num_tokens={x.shape[0]}"
            )
        out = x.new_empty(num_out_tokens, x.shape[-1])
    _kernels.pool(
        out,
        x,
        cu_seqlens,
        cu_images,
        image_starts,
        grids,
        experts,
        kernels,
        out_cu_seqlens,
        scales,
        function,
        conv_weights,
        stream_of(x),
    )
    return out
