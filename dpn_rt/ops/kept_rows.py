"""Which rows of this stage the next one has, when some visual rows of each image stay."""

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

    Sequence b has the images `cu_images[b]` to `cu_images[b + 1] - 1`, any number of them. Image i has
    `image_lengths[i]` rows; the first is row `image_starts[i]` of its sequence. Of these rows
    `kept[cu_kept[i]:cu_kept[i + 1]]` stay, counted from the image's first row. All rows outside of images stay. Rows
    keep their order. `torch.index_select` then copies hidden states, positions and keys.

    Args:
        cu_seqlens: `[num_seqs + 1]` int32.
        cu_images: `[num_seqs + 1]` int32, first image of every sequence, then `num_images`.
        image_starts: `[num_images]` int32 first visual row of each image, relative to its sequence. The images of a
            sequence are in the order of their rows and do not overlap.
        image_lengths: `[num_images]` int32 visual rows of each image.
        kept: `[num_kept]` int32, ascending within each image, as from `segmented_top_k`.
        cu_kept: `[num_images + 1]` int32 first entry of `kept` of each image, then `num_kept`.
        out_cu_seqlens: `[num_seqs + 1]` int32, what `cu_kept` makes of `cu_seqlens`.
        num_tokens: number of rows of this stage. The GPU needs it without `out`; on the CPU `cu_seqlens` must end with
            it.
        out: `[num_out_tokens]` int64, contiguous, no memory shared with the other arguments. On the GPU the op does not
            know `num_out_tokens`, so `out` may have more entries; those after the first `num_out_tokens` become 0,
            which is a valid row. `kept` may have more entries there too.

    Returns:
        `[num_out_tokens]` int64. On the GPU it is `out`; without `out` it has `num_tokens` entries.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device, layout or content; nothing was written.
    """
    if out is None:
        out = cu_seqlens.new_empty(_num_rows(cu_seqlens, out_cu_seqlens, num_tokens), dtype=torch.int64)
    tensors = (cu_seqlens, cu_images, image_starts, image_lengths, kept, cu_kept, out_cu_seqlens)
    _kernels.kept_rows(out, *tensors, num_tokens, stream_of(cu_seqlens))
    return out


def _num_rows(cu_seqlens: Tensor, out_cu_seqlens: Tensor, num_tokens: int | None) -> int:
    """Number of entries of the output: the rows of the next stage, or on the GPU as many as it can have."""
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
