"""What a linear layer asks of its matrix, in whatever form the engine stores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from dpn_rt.model.weights.product import Products
from dpn_rt.schema.activation import ProductActivation
from dpn_rt.schema.weights import WeightSpec

Number = Literal["integer", "e4m3"]
"""What a weight stores, times a scale: integers, or 8-bit floats with 4 bits of exponent and 3 of mantissa."""


class Weight(Protocol):
    """A matrix `[out_features, in_features]`.

    A further form is one class with these, a line in `forms.py`, and its choice of products in `product.py`.
    """

    @classmethod
    def specs(cls, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, WeightSpec]:
        """The tensors that an engine stores for it, by suffix: `weight` stands for `layers.0.o.weight`.

        Args:
            out_features: rows of the matrix.
            in_features: columns of the matrix.
            dtype: of the activations.
        """

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], module: str, *, prepack: bool, rows: slice = slice(None)) -> Weight:
        """The weight of one linear layer.

        Args:
            tensors: of the engine, by canonical name.
            module: canonical name of the layer, such as `layers.0.o`.
            prepack: also keep a copy in the layout that the library of matrix products likes best, where it has one.
            rows: of the matrix; by default all.
        """

    @classmethod
    def take_rows(cls, tensors: Mapping[str, Tensor], module: str, rows: Sequence[slice]) -> dict[str, Tensor]:
        """The stored tensors of a matrix that has some rows of `module` alone, by suffix; copies.

        Args:
            tensors: of the engine, by canonical name.
            module: canonical name of the layer.
            rows: one below the other; in 8 and 4 bits they start and end between tiles.
        """

    @property
    def num_bytes(self) -> int:
        """Of the stored tensors, without a prepacked copy."""

    def products(
        self, bias: Tensor | None, activation: ProductActivation | None = None, *, ragged: bool = True
    ) -> Products:
        """How rows are multiplied with it.

        Args:
            bias: `[out_features]`, dtype of the activations.
            activation: applied to the result.
            ragged: whether the number of rows changes from call to call, as in a decoder; not in a tower.
        """


class QuantizedWeight(Weight, Protocol):
    """A weight in fewer bits than the activations have."""

    suffix: ClassVar[str]
    """Of the tensor that tells the form."""
    bits: ClassVar[int]
    """Of a number."""
    number: ClassVar[Number]
    """What is stored."""
    least: ClassVar[int]
    """Number that can be stored."""
    largest: ClassVar[int]
    """Number that can be stored."""
    group: ClassVar[int | None]
    """Columns of a row that share a scale; None: all."""

    @classmethod
    def quantize(cls, weight: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        """The stored tensors, by suffix.

        Args:
            weight: `[out_features, in_features]` of any dtype.
            scale: `[out_features]`, or `[out_features, groups]` where a row has groups: the weight is numbers from
                `least` to `largest` times these, which are found again; None: scales that fit the weight well.
        """

    @classmethod
    def arrange(cls, stored: Tensor, scale: Tensor, *, row_major: bool, dtype: torch.dtype) -> Tensor:
        """The tensor `suffix` in the layout that products take where it is; `load` tells layouts by their dtype.

        Args:
            stored: as engines have it, on the device of the products.
            scale: the tensor `scale`, on any device.
            row_major: whether libraries of matrix products take it, as on GPUs, and not our kernels.
            dtype: of the activations.
        """
