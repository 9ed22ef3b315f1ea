"""x W^T + b for few rows, where reading W takes most of the time."""

from __future__ import annotations

from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.ops.checked import checked_op


@checked_op
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` on the CPU, with float32 accumulation, rounded once.

    Reads `weight` from memory once; with few rows it runs at the speed of memory. A row's result does not depend on the
    other rows. For many rows a library of matrix products is faster; `dpn_rt.model.weights.product` chooses between
    them.

    Args:
        x: `[num_tokens, in_features]`, float32 or bfloat16; rows may be strided.
        weight: `[out_features, in_features]`, contiguous, dtype of `x`.
        bias: `[out_features]`, dtype of `x`.
        out: `[num_tokens, out_features]`, contiguous, no memory shared with the other arguments.

    Returns:
        `[num_tokens, out_features]`.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device or layout.
    """
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    _kernels.linear(out, x, weight, bias)
    return out
