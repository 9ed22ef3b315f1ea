"""Activation functions of vision towers."""

from typing import Literal

Activation = Literal["quick_gelu", "gelu"]
"""`quick_gelu` is `x * sigmoid(1.702 x)`; `gelu` is `x * Phi(x)`, exact (erf)."""
