"""Rows in 8 bits, and what the sums of a product with them stand for: the two ends of a W8A8 product."""

from __future__ import annotations

import torch
from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.ops.checked import checked_op
from dpn_rt.ops.stream import stream_of
from dpn_rt.schema.activation import Activation


@checked_op
def quantize(
    x: Tensor,
    dtype: torch.dtype,
    *,
    num_rows: int | None = None,
    columns: int | None = None,
    out: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each row of `x` in 8 bits, times a scale of its own.

    int8: `scale = max|x| / 127.5` and `q = round(x / scale)`, ties to even, within -128 to 127, as in the package
    compressed-tensors. float8_e4m3fn: `scale = max|x| / 448` and the number of that dtype nearest to `x / scale`, ties
    to even. A row of zeros has the scale 0 and zeros. One that holds NaN or infinity has the scale NaN and zeros.

    Args:
        x: `[num_tokens, in_features]`, float32 or bfloat16; rows may be strided.
        dtype: of the result, int8 or float8_e4m3fn.
        num_rows: rows of the result, at least `num_tokens`; those after `x` are zeros. None: `num_tokens`.
        columns: columns of the result, at least `in_features`; those after `x` are zeros. None: `in_features`.
        out: the first result, `[num_rows, columns]`, contiguous, no memory shared with the other arguments; its shape
            and dtype count, then, instead of the three arguments before.
        scale: the second result, `[num_tokens]` float32, contiguous, no memory shared with the other arguments.

    Returns:
        `[num_rows, columns]` of `dtype`, and the scales `[num_tokens]` float32.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device or layout.
    """
    num_tokens, in_features = x.shape[0], x.shape[-1]
    if out is None:
        shape = (num_tokens if num_rows is None else num_rows, in_features if columns is None else columns)
        out = x.new_empty(shape, dtype=dtype)
    if scale is None:
        scale = x.new_empty(num_tokens, dtype=torch.float32)
    _kernels.quantize(out, scale, x, stream_of(out))
    return out, scale


@checked_op
def dequantize(
    sums: Tensor,
    row_scale: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`activation(sums * row_scale[m] * scale[n] + bias[n])`, computed in float32 in this order and rounded once.

    Args:
        sums: `[num_rows, columns]` int32 or float32, contiguous: at least `[num_tokens, out_features]`, what is beyond
            is not read.
        row_scale: `[num_tokens]` float32, as `quantize` gives it. A row whose scale is NaN gives NaN.
        scale: `[out_features]` float32: of each column of `sums`.
        bias: `[out_features]`, dtype of the result.
        activation: see `Activation`; None: without.
        dtype: of the result, float32 or bfloat16; None: that of `bias`, or float32 without one.
        out: `[num_tokens, out_features]`, contiguous, shares no memory with the other arguments; its dtype counts.

    Returns:
        `[num_tokens, out_features]`.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device or layout, or `activation` is unknown.
    """
    if out is None:
        wanted = dtype or (torch.float32 if bias is None else bias.dtype)
        out = sums.new_empty(row_scale.shape[0], scale.shape[0], dtype=wanted)
    _kernels.dequantize(out, sums, row_scale, scale, bias, activation, stream_of(out))
    return out
