"""Depthwise 7x7 convolution of images whose channels stand side by side."""

from __future__ import annotations

from torch import Tensor, empty_like

from dpn_rt import _kernels
from dpn_rt.ops.checked import checked_op


@checked_op
def depthwise_conv(x: Tensor, taps: Tensor, bias: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Each channel convolved by itself on the CPU: stride 1, zeros around the image, summed in float32, rounded once.

    Args:
        x: `[num_images, height, width, channels]`, float32 or bfloat16, contiguous.
        taps: `[49, channels]` of the 7x7 kernel, row by row; dtype of `x`.
        bias: `[channels]`, dtype of `x`.
        out: shape and dtype of `x`, contiguous, no memory shared with the other arguments.

    Returns:
        `[num_images, height, width, channels]`.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device or layout.
    """
    out = empty_like(x) if out is None else out
    _kernels.depthwise_conv(out, x, taps, bias)
    return out
