"""x W^T + b with weights and rows of x in 8 bits (W8A8)."""

from __future__ import annotations

from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.ops.checked import checked_op
from dpn_rt.schema.activation import ProductActivation


@checked_op
def linear_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: ProductActivation | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`activation(x @ W.T + bias)` on the CPU: row n of W is `scale[n]` times integers, rows of `x` become integers.

    Each row of `x` is quantised by itself: `s = max|x| / 127.5` and `a = round(x / s)`, ties to even, within -128 to
    127, as in the package compressed-tensors. A row of zeros has `s = 0` and `a = 0`. Products of integers are summed
    exactly, converted to float32, multiplied by `s` and then by `scale[n]`. The bias is added and the activation
    applied in float32, and the result is rounded to the dtype of `x`. So a row's result has the same bits whatever the
    other rows, the number of threads, and, without an activation, the instruction set.

    A row of `x` that holds NaN or infinity gives NaN in all of its outputs; other rows are not affected.

    Any number of rows is fast: few read `weight` once at the speed of memory, many are multiplied in blocks.

    Args:
        x: `[num_tokens, in_features]`, float32 or bfloat16; rows may be strided. At most 131071 columns.
        weight: `[ceil(out_features / 16), ceil(in_features / 4), 16, 4]` uint8, contiguous. Element `[p, j, n, i]` is
            `q + 128` of row `16 p + n` and column `4 j + i`, with q from -128 to 127. Rows and columns that fill up the
            last tiles hold 128. `dpn_rt.model.weights.tiles.pack_int8` makes it.
        scale: `[out_features]` float32: `W = q * scale`.
        bias: `[out_features]`, dtype of `x`.
        activation: of the result; of `silu_mul`, gate and up are halves of W's rows, each a multiple of 16.
        out: `[num_tokens, out_features]`, contiguous, dtype of `x`, no memory shared with the other arguments. With
            `silu_mul` it has half as many columns.

    Returns:
        `[num_tokens, out_features]`, or half as many columns, dtype of `x`.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device or layout.
    """
    if out is None:
        out = x.new_empty(x.shape[0], scale.shape[0] // (2 if activation == "silu_mul" else 1))
    _kernels.linear_int8(out, x, weight, scale, bias, activation)
    return out
