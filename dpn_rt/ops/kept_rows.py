"""From the visual rows that stay to the rows of the next stage."""

from __future__ import annotations

import torch
from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.errors import KernelArgumentError
from dpn_rt.ops.checked import checked_op
from dpn_rt.ops.stream import stream_of


@checked_op
def kept_rows(
    cu_seqlens: Tensor,
    cu_images: Tensor,
    image_starts: Tensor,
    image_lengths: Tensor,
    kept: Tensor,
    cu_kept: Tensor,
    out_cu_seqlens: Tensor,
    *,
    num_tokens: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The packed row of this stage that each packed row of the next stage is copied from.

    Sequence b has the images `cu_images[b]` to `cu_images[b + 1] - 1`, any number of them. Image i is the
    `image_lengths[i]` rows from row `image_starts[i]` of its sequence on, of which the rows
    `kept[cu_kept[i]:cu_kept[i + 1]]` stay, counted from the image's first. All other rows of the sequence stay. Rows
    keep their order. Hidden states, positions and keys follow by `torch.index_select`.

    Args:
        cu_seqlens: `[num_seqs + 1]` int32.
        cu_images: `[num_seqs + 1]` int32, first image of every sequence, then `num_images`.
        image_starts: `[num_images]` int32 first visual row of each image, relative to its sequence. The images of a
            sequence are listed in the order of their rows, and no two share a row.
        image_lengths: `[num_images]` int32 visual rows of each image.
        kept: `[num_kept]` int32, ascending within each image, as from `segmented_top_k`.
        cu_kept: `[num_images + 1]` int32 first entry of `kept` of each image, then `num_kept`.
        out_cu_seqlens: `[num_seqs + 1]` int32, what `cu_kept` makes of `cu_seqlens`.
        num_tokens: rows of this stage. On the GPU needed without `out`; elsewhere the end of `cu_seqlens` must agree.
        out: `[num_out_tokens]` int64, contiguous, no memory shared with the other arguments. On the GPU, where the
            number of rows is not known to the host, it may have more: those are 0, so that a row is copied for them
            that exists, and without `out` there are `num_tokens`. `kept` may have more than `cu_kept` says there too.

    Returns:
        `[num_out_tokens]` int64.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device, layout or content; nothing was written.
    """
    if out is None:
        out = cu_seqlens.new_empty(_num_rows(cu_seqlens, out_cu_seqlens, num_tokens), dtype=torch.int64)
    tensors = (cu_seqlens, cu_images, image_starts, image_lengths, kept, cu_kept, out_cu_seqlens)
    _kernels.kept_rows(out, *tensors, num_tokens, stream_of(cu_seqlens))
    return out


def _num_rows(cu_seqlens: Tensor, out_cu_seqlens: Tensor, num_tokens: int | None) -> int:
    """Rows of the output: those of the next stage, or as many as it can have where the host cannot read."""
    if cu_seqlens.is_cuda:
        if num_tokens is None:
            raise KernelArgumentError(
                f"kept_rows: num_tokens and out are None, expected one of them on {cu_seqlens.device}"
            )
        return num_tokens
    num_out_tokens = _kernels.packed_size("kept_rows", "out_cu_seqlens", out_cu_seqlens)
    most = _kernels.packed_size("kept_rows", "cu_seqlens", cu_seqlens)
    if num_out_tokens > most:
        raise KernelArgumentError(
            f"kept_rows: out_cu_seqlens ends at {num_out_tokens}, expected at most {most}, where cu_seqlens ends"
        )
    return num_out_tokens
