"""The forms in which engines store matrices: which one a weight takes, and which one a file has."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dpn_rt.model.weights.dense import DenseWeight
from dpn_rt.model.weights.int4 import Int4Weight
from dpn_rt.model.weights.int8 import Int8Weight
from dpn_rt.model.weights.tiles import TILE_ROWS
from dpn_rt.model.weights.weight import QuantizedWeight, Weight
from dpn_rt.schema.weights import Quantize, WeightSpec

QUANTIZED: dict[int, type[QuantizedWeight]] = {8: Int8Weight, 4: Int4Weight}
"""By bits."""
BITS: dict[Quantize, int] = {"int8": 8, "int4": 4}
DENSE_SUFFIX = f".{DenseWeight.suffix}"


def quantized_form(spec: WeightSpec, quantize: Quantize) -> type[QuantizedWeight] | None:
    """The form that a canonical weight takes in an engine; None: it stays in its dtype."""
    if quantize == "none" or spec.least_bits is None or (quantize == "int8" and spec.kept_by_int8):
        return None
    bits = max(BITS[quantize], spec.least_bits)
    return QUANTIZED[bits if spec.shape[0] % TILE_ROWS == 0 else 8]


def stored_specs(name: str, spec: WeightSpec, quantize: Quantize) -> dict[str, WeightSpec]:
    """The tensors that an engine stores for a canonical weight, by their names."""
    form = quantized_form(spec, quantize)
    if form is None:
        return {name: spec}
    module, (out_features, in_features) = name.removesuffix(DENSE_SUFFIX), spec.shape
    return {
        f"{module}.{suffix}": stored for suffix, stored in form.specs(out_features, in_features, spec.dtype).items()
    }


def form_of(tensors: Mapping[str, Tensor], module: str) -> type[QuantizedWeight] | type[DenseWeight]:
    """The form that an engine has the weight of a linear layer in."""
    return next((form for form in QUANTIZED.values() if f"{module}.{form.suffix}" in tensors), DenseWeight)


def load_weight(tensors: Mapping[str, Tensor], module: str, *, prepack: bool, rows: slice = slice(None)) -> Weight:
    """The weight of a linear layer in the form that the engine has; all arguments as of `Weight.load`."""
    return form_of(tensors, module).load(tensors, module, prepack=prepack, rows=rows)
