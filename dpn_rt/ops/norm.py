"""RMSNorm and LayerNorm, alone or fused with the residual addition before them.

Each raises `KernelArgumentError` where an argument has the wrong shape, dtype, device or layout.
"""

from __future__ import annotations

from torch import Tensor, empty_like

from dpn_rt import _kernels
from dpn_rt.ops.checked import checked_op
from dpn_rt.ops.stream import stream_of


@checked_op
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """RMSNorm of every row: `x / sqrt(mean(x^2) + eps) * weight`, computed in float32 and rounded once.

    Args:
        x: `[num_tokens, hidden_size]`, float32 or bfloat16; rows may be strided.
        weight: `[hidden_size]`, dtype of `x`.
        eps: at least 0.
        out: `[num_tokens, hidden_size]`, contiguous; may be `x`.

    Returns:
        `[num_tokens, hidden_size]`.
    """
    out = empty_like(x) if out is None else out
    _kernels.rms_norm(out, x, weight, eps, stream_of(out))
    return out


@checked_op
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """`residual += x` in place (rounded to its dtype), then RMSNorm of the sum.

    Args:
        x: `[num_tokens, hidden_size]`, float32 or bfloat16.
        residual: `[num_tokens, hidden_size]`, contiguous, dtype of `x`, no memory shared with `x` or `out`.
        weight: `[hidden_size]`, dtype of `x`.
        eps: at least 0.
        out: as in `rms_norm`; may be `x`.

    Returns:
        `[num_tokens, hidden_size]`.
    """
    out = empty_like(x) if out is None else out
    _kernels.add_rms_norm(out, x, residual, weight, eps, stream_of(out))
    return out


@checked_op
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """LayerNorm of every row, computed in float32 and rounded once.

    Args:
        x: `[num_tokens, hidden_size]`, float32 or bfloat16; rows may be strided.
        weight: `[hidden_size]`, dtype of `x`.
        bias: `[hidden_size]`, dtype of `x`.
        eps: at least 0.
        out: `[num_tokens, hidden_size]`, contiguous; may be `x`.

    Returns:
        `[num_tokens, hidden_size]`.
    """
    out = empty_like(x) if out is None else out
    _kernels.layer_norm(out, x, weight, bias, eps, stream_of(out))
    return out


@checked_op
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """`residual += x` in place (rounded to its dtype), then LayerNorm of the sum.

    Args:
        x: `[num_tokens, hidden_size]`, float32 or bfloat16.
        residual: `[num_tokens, hidden_size]`, contiguous, dtype of `x`, no memory shared with `x` or `out`.
        weight: `[hidden_size]`, dtype of `x`.
        bias: `[hidden_size]`, dtype of `x`.
        eps: at least 0.
        out: as in `layer_norm`; may be `x`.

    Returns:
        `[num_tokens, hidden_size]`.
    """
    out = empty_like(x) if out is None else out
    _kernels.add_layer_norm(out, x, residual, weight, bias, eps, stream_of(out))
    return out
