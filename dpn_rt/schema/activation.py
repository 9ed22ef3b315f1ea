"""Activation functions of vision towers."""

from __future__ import annotations

from typing import Literal

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]
"""`quick_gelu` is `x * sigmoid(1.702 x)`; `gelu` is `x * Phi(x)`, exact (erf); `gelu_tanh` approximates it by tanh."""
