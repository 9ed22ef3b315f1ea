"""The activation functions, by torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return functional.silu(gate) * up


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """As torch's, which loses all digits of large negative inputs by cancellation, even in float64."""
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


FUNCTIONS = {"quick_gelu": quick_gelu, "gelu": functional.gelu, "gelu_tanh": gelu_tanh}
ACTIVATIONS = {**FUNCTIONS, "silu_mul": silu_mul}
"""All that a product may apply."""
