"""The forms in which engines store matrices: which one a weight takes, and which one a file has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpn_rt.model.weights.dense import DenseWeight
from dpn_rt.model.weights.fp8 import Fp8Weight
from dpn_rt.model.weights.int4 import Int4Weight
from dpn_rt.model.weights.int8 import Int8Weight
from dpn_rt.model.weights.tiles import TILE_ROWS
from dpn_rt.model.weights.weight import QuantizedWeight, Weight
from dpn_rt.schema.dtypes import Quantize
from dpn_rt.schema.weights import WeightSpec

FORMS: Mapping[Quantize, type[QuantizedWeight]] = {"int8": Int8Weight, "int4": Int4Weight, "fp8": Fp8Weight}
DENSE_SUFFIX = f".{DenseWeight.suffix}"


def quantized_form(spec: WeightSpec, quantize: Quantize) -> type[QuantizedWeight] | None:
    """The form that a canonical weight takes in an engine; None: it stays in its dtype."""
    if quantize == "none" or spec.least_bits is None or (quantize != "int4" and spec.kept_by_int8):
        return None
    form = FORMS[quantize]
    fits = spec.least_bits <= form.bits and (form is not Int4Weight or spec.shape[0] % TILE_ROWS == 0)
    return form if fits else Int8Weight


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
    return next((form for form in FORMS.values() if f"{module}.{form.suffix}" in tensors), DenseWeight)


def load_weight(tensors: Mapping[str, Tensor], module: str, *, prepack: bool, rows: slice = slice(None)) -> Weight:
    """The weight of a linear layer in the form that the engine has; all arguments as of `Weight.load`."""
    return form_of(tensors, module).load(tensors, module, prepack=prepack, rows=rows)


def place(
    weights: Mapping[str, Tensor], name: str, device: torch.device, *, row_major: bool, dtype: torch.dtype
) -> Tensor:
    """A stored tensor on a device, in the layout that products take there; not copied where it is so already.

    Args:
        weights: of the engine, by canonical name, on any device.
        name: of the tensor.
        device: of the products.
        row_major: see `QuantizedWeight.arrange`.
        dtype: of the activations.
    """
    module, _, suffix = name.rpartition(".")
    tensor = weights[name].to(device)
    form = next((form for form in FORMS.values() if form.suffix == suffix), None)
    if form is None:
        return tensor
    return form.arrange(tensor, weights[f"{module}.scale"], row_major=row_major, dtype=dtype)
