"""The dtypes and the forms of weights that there are, by name. Commands import them without torch."""

from __future__ import annotations

from typing import Literal

DType = Literal["float32", "bfloat16", "float16"]
Quantize = Literal["none", "int8", "int4", "fp8"]
"""How an engine stores the matrices of linear layers: in its dtype, or where they may be in integers of 8 or 4 bits, or
in floats of 8."""
