"""Which rows of each image are kept: those with the largest scores."""

from __future__ import annotations

import torch
from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.errors import KernelArgumentError
from dpn_rt.ops.checked import checked_op
from dpn_rt.ops.stream import stream_of


@checked_op
def segmented_top_k(scores: Tensor, cu_scores: Tensor, cu_kept: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Indices of the largest scores of every segment, ascending and relative to the segment's first score.

    Segment s has the scores `cu_scores[s]` to `cu_scores[s + 1] - 1`. The `cu_kept[s + 1] - cu_kept[s]` largest of them
    are kept, any number from none to all. Of equal scores (0 and -0 are equal) those with lower indices are kept. NaN
    counts as the smallest.

    Args:
        scores: `[num_scores]` float32, contiguous.
        cu_scores: `[num_segments + 1]` int32; a segment has at most 65,536 scores.
        cu_kept: `[num_segments + 1]` int32 place of each segment's indices in the result, then `num_kept`.
        out: `[num_kept]` int32, contiguous, no memory shared with the other arguments. On the GPU the op does not know
            `num_kept`, so `out` may have more entries; those after the first `num_kept` are not written. `scores` may
            have more entries there too.

    Returns:
        `[num_kept]` int32. On the GPU it is `out`; without `out` it has `num_scores` entries.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device, layout or content; nothing was written.
    """
    if out is None:
        num_kept = num_scores = scores.shape[0]
        if not scores.is_cuda:
            num_kept = _kernels.packed_size("segmented_top_k", "cu_kept", cu_kept)
        if num_kept > num_scores:
            raise KernelArgumentError(
                f"segmented_top_k: cu_kept ends at {num_kept}, expected at most num_scores={num_scores}"
            )
        out = torch.empty(num_kept, dtype=torch.int32, device=scores.device)
    _kernels.segmented_top_k(out, scores, cu_scores, cu_kept, stream_of(scores))
    return out
