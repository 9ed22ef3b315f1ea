"""Activation functions over rows."""

from __future__ import annotations

from torch import Tensor, empty_like

from dpn_rt import _kernels
from dpn_rt.ops.checked import checked_op
from dpn_rt.ops.stream import stream_of
from dpn_rt.schema.activation import Activation


@checked_op
def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`gate * sigmoid(gate) * up`, computed in float32 and rounded once.

    Args:
        gate_up: `[num_tokens, 2 * intermediate_size]`, float32 or bfloat16: gate, then up; rows may be strided.
        out: `[num_tokens, intermediate_size]`, dtype of `gate_up`, rows may be strided. It may be the gate half of
            `gate_up`, and must not overlap it otherwise.

    Returns:
        `[num_tokens, intermediate_size]`.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device or layout.
    """
    if out is None:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[-1] // 2)
    _kernels.silu_mul(out, gate_up, stream_of(out))
    return out


@checked_op
def activation(x: Tensor, kind: Activation, *, out: Tensor | None = None) -> Tensor:
    """An activation function of every element, computed in float32 and rounded once.

    Args:
        x: `[num_tokens, intermediate_size]`, float32 or bfloat16; rows may be strided.
        kind: see `Activation`.
        out: shape and dtype of `x`, rows may be strided; may be `x`.

    Returns:
        `[num_tokens, intermediate_size]`.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device or layout, or `kind` is unknown.
    """
    out = empty_like(x) if out is None else out
    _kernels.activation(out, x, kind, stream_of(out))
    return out
