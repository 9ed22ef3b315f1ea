"""What a linear layer asks of its matrix, in whatever form the engine stores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from dpn_rt.model.weights.product import Products
from dpn_rt.schema.weights import WeightSpec


class Weight(Protocol):
    """A matrix `[out_features, in_features]`.

    A further form (8 or 4 bits) is one class with these four, and its choice of products in `product.py`.
    """

    @staticmethod
    def specs(out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, WeightSpec]:
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

    @property
    def num_bytes(self) -> int:
        """Of the stored tensors, without a prepacked copy."""

    def products(self, bias: Tensor | None) -> Products:
        """How rows are multiplied with it.

        Args:
            bias: `[out_features]`, dtype of the activations.
        """
