"""x W^T + b: by our own kernel where reading W takes most of the time, else by torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt import _kernels
from dpn_rt.errors import KernelArgumentError
from dpn_rt.ops.checked import checked_op
from dpn_rt.ops.isa import cpu_isa

# Rows up to which streaming the weight once beats torch; measured by benchmarks/ops.py.
MOST_STREAMED_ROWS = {"avx512_bf16": 32, "avx512": 32, "avx2": 12, "portable": 4}[cpu_isa()]
_STREAMED_DTYPES = (torch.bfloat16, torch.float32)


@checked_op
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, float32 accumulation, rounded once.

    Up to `MOST_STREAMED_ROWS` rows of float32 or bfloat16 on the CPU run in a kernel that reads `weight` once, at the
    speed of memory where that is the limit; there a row's result does not depend on the other rows. Everything else is
    torch's own product.

    Args:
        x: `[num_tokens, in_features]`; rows may be strided.
        weight: `[out_features, in_features]`, contiguous, dtype of `x`.
        bias: `[out_features]`, dtype of `x`.
        out: `[num_tokens, out_features]`, contiguous, no memory shared with the other arguments.

    Returns:
        `[num_tokens, out_features]`.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device or layout.
    """
    # An x that has not two dimensions goes to the kernel, whose checks refuse it; torch would take it.
    few_rows = x.ndim != 2 or x.shape[0] <= MOST_STREAMED_ROWS
    if few_rows and x.dtype in _STREAMED_DTYPES and x.is_cpu:
        if out is None:
            out = x.new_empty(x.shape[0], weight.shape[0])
        _kernels.linear(out, x, weight, bias)
        return out
    _check(x, weight, bias, out)
    try:
        if out is None:
            return functional.linear(x, weight, bias)
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)
    except RuntimeError as error:
        if type(error) is not RuntimeError or "CUDA error" in str(error):
            raise  # memory that ran out, or a device that failed: no argument's fault
        raise KernelArgumentError(f"linear: {error}") from error


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> None:
    """As the kernel checks its arguments: torch would broadcast, resize, or overwrite what it reads."""
    if x.layout != torch.strided:
        raise KernelArgumentError(f"linear: x has layout {x.layout}, expected {torch.strided}")
    num_tokens, in_features = x.shape
    out_features = weight.shape[0]
    expected = {"weight": (weight, (out_features, in_features)), "bias": (bias, (out_features,))}
    for name, (tensor, shape) in {**expected, "out": (out, (num_tokens, out_features))}.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise KernelArgumentError(f"linear: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise KernelArgumentError(
                f"linear: {name} is {tensor.dtype} on {tensor.device}, expected {x.dtype} on {x.device}"
            )
        if not tensor.is_contiguous():
            raise KernelArgumentError(f"linear: {name} has strides {tensor.stride()}, expected a contiguous tensor")
    for name, read in (("x", x), ("weight", weight), ("bias", bias)):
        if out is not None and read is not None and _overlap(out, read):
            raise KernelArgumentError(f"linear: out shares memory with {name}")


def _overlap(a: Tensor, b: Tensor) -> bool:
    (a_start, a_end), (b_start, b_end) = _extent(a), _extent(b)
    return a_start < b_end and b_start < a_end


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte, and one past the last."""
    start = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.itemsize if tensor.numel() else start
