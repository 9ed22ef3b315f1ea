"""A linear layer over packed rows, and where an engine keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dpn_rt.model.weights.dense import DenseWeight
from dpn_rt.model.weights.forms import load_weight
from dpn_rt.model.weights.weight import Weight
from dpn_rt.schema.activation import ProductActivation
from dpn_rt.schema.weights import NamedSpecs, WeightSpec


class Linear:
    """`activation(x @ weight.T + bias)`; without an activation the sum."""

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        activation: ProductActivation | None = None,
        *,
        ragged: bool = True,
    ) -> None:
        """
        Args:
            weight: `[out_features, in_features]`.
            bias: `[out_features]`, dtype of the activations.
            activation: applied to the result.
            ragged: see `Weight.products`.

        Raises:
            KernelArgumentError: the two do not fit each other.
        """
        products = weight.products(bias, activation, ragged=ragged)
        self._few_rows, self._many_rows = products.few_rows, products.many_rows
        self._most_few_rows = products.most_few_rows

    def __call__(self, x: Tensor) -> Tensor:
        """`[num_tokens, in_features]` -> `[num_tokens, out_features]`, half as many columns after `silu_mul`."""
        product = self._few_rows if x.shape[0] <= self._most_few_rows else self._many_rows
        return product(x)


def linear_specs(
    module: str,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    *,
    bias: bool,
    fused: tuple[int, ...] = (),
    least_bits: int | None = None,
) -> NamedSpecs:
    """What an engine that is not quantised stores for a linear layer.

    Args:
        module: its canonical name, such as `layers.0.o`.
        dtype: of the activations.
        fused: rows of each published layer that this one holds, one below the other; empty: it holds one.
        least_bits: see `WeightSpec`.
    """
    for suffix, spec in DenseWeight.specs(out_features, in_features, dtype).items():
        yield f"{module}.{suffix}", replace(spec, fused_rows=fused, least_bits=least_bits)
    if bias:
        yield f"{module}.bias", WeightSpec((out_features,), dtype, fused)


def load_linear(
    tensors: Mapping[str, Tensor],
    module: str,
    *,
    prepack: bool,
    rows: slice = slice(None),
    activation: ProductActivation | None = None,
    ragged: bool = True,
) -> Linear:
    """The linear layer `module` of an engine, and an activation of its result.

    The rest as of `Weight.load` and `Weight.products`.
    """
    bias = tensors.get(f"{module}.bias")
    weight = load_weight(tensors, module, prepack=prepack, rows=rows)
    return Linear(weight, None if bias is None else bias[rows], activation, ragged=ragged)
