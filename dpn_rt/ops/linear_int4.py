"""x W^T + b with weights in 4 bits, a scale for 128 columns of a row, and rows of x in 8 bits (W4A8)."""

from __future__ import annotations

from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.ops.checked import checked_op
from dpn_rt.schema.activation import ProductActivation


@checked_op
def linear_int4(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: ProductActivation | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`activation(x @ W.T + bias)` on the CPU: W is integers times a scale for each row and group of 128 columns.

    Rows of `x` are rounded to integers as in `linear_int8`. Products of integers are summed exactly within a group,
    converted to float32, multiplied by the scale of the group, and added in float32 in the order of the groups. The sum
    is multiplied by the scale of the row of `x`, the bias is added, the activation applied, and the result is rounded
    to the dtype of `x`. So a row's result has the same bits whatever the other rows, the number of threads, and,
    without an activation, the instruction set.

    A row of `x` that holds NaN or infinity gives NaN in all of its outputs; other rows are not affected.

    Any number of rows is fast: few read `weight` once at the speed of memory, many are multiplied in blocks.

    Args:
        x: `[num_tokens, in_features]`, float32 or bfloat16; rows may be strided. At most 131071 columns.
        weight: `[ceil(out_features / 16), ceil(in_features / 8), 16, 4]` uint8, contiguous. Byte `[p, j, n, i]` has, of
            row `16 p + n`, column `8 j + i` in its low bits and column `8 j + 4 + i` in its high bits, each as `q + 8`
            with q from -8 to 7. Rows and columns that fill up the last tiles hold 8.
            `dpn_rt.model.weights.tiles.pack_int4` makes it.
        scale: `[ceil(out_features / 16), ceil(in_features / 128), 16]` bfloat16, contiguous: of row `16 p + n` in the
            columns of group g at `[p, g, n]`.
        bias: `[out_features]`, dtype of `x`.
        activation: of the result; of `silu_mul`, gate and up are halves of W's rows, each a multiple of 16.
        out: `[num_tokens, out_features]`, contiguous, dtype of `x`, no memory shared with the other arguments. With
            `silu_mul` it has half as many columns.

    Returns:
        `[num_tokens, out_features]`, or half as many columns, dtype of `x`. Without `out` and `bias`, `out_features` is
        the number of rows that the tiles have, a multiple of 16.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device or layout.
    """
    if out is None:
        out_features = 16 * weight.shape[0] if bias is None else bias.shape[0]
        out = x.new_empty(x.shape[0], out_features // (2 if activation == "silu_mul" else 1))
    _kernels.linear_int4(out, x, weight, scale, bias, activation)
    return out
