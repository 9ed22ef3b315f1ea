"""Activation functions of towers and of the decoder."""

from __future__ import annotations

from typing import Literal

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]
"""`quick_gelu` is `x * sigmoid(1.702 x)`; `gelu` is `x * Phi(x)`, exact (erf); `gelu_tanh` approximates it by tanh."""

Gate = Literal["silu_mul"]
"""`silu(gate) * up` of two halves of the columns, gate first."""

ProductActivation = Activation | Gate
"""What a product may apply to its result."""
