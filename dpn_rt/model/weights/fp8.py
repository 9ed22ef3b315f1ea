"""A weight in 8-bit floats (e4m3), one scale a row, multiplied on GPUs with rows that are rounded so too (W8A8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dpn_rt.model.weights.dense import DenseWeight
from dpn_rt.model.weights.product import Products
from dpn_rt.model.weights.row_major import aligned, row_major_products
from dpn_rt.model.weights.weight import Number, Weight
from dpn_rt.schema.activation import ProductActivation
from dpn_rt.schema.weights import WeightSpec

FP8 = torch.float8_e4m3fn
LARGEST = 448
ROWS_AT_A_TIME = 1024
"""Rows that are made dense together, which bounds the memory."""


class Fp8Weight:
    """A `QuantizedWeight` `[out_features, in_features]`, row by row.

    On a CPU, which multiplies no 8-bit floats, it is a `DenseWeight` of what it stands for, in the dtype of the
    activations: rows are not rounded, and it takes as much memory as an engine that is not quantised.
    """

    suffix: ClassVar[str] = "fp8"
    bits: ClassVar[int] = 8
    number: ClassVar[Number] = "e4m3"
    least: ClassVar[int] = -LARGEST
    largest: ClassVar[int] = LARGEST
    group: ClassVar[int | None] = None

    def __init__(self, matrix: Tensor, scale: Tensor) -> None:
        """See `row_major_products`."""
        self._matrix, self._scale = matrix, scale

    @classmethod
    def specs(cls, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, WeightSpec]:
        """The matrix, and the scale of each row."""
        return {
            cls.suffix: WeightSpec((out_features, in_features), FP8),
            "scale": WeightSpec((out_features,), torch.float32),
        }

    @classmethod
    def quantize(cls, weight: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        """Without scales, the largest value of a row becomes 448 or -448, and a row of zeros has the scale 0."""
        weight = weight.float()
        scale = weight.abs().amax(1) / LARGEST if scale is None else scale.float()
        scaled = weight / torch.where(scale == 0, 1.0, scale)[:, None]
        return {cls.suffix: scaled.clamp_(-LARGEST, LARGEST).to(FP8), "scale": scale}

    @classmethod
    def arrange(cls, stored: Tensor, scale: Tensor, *, row_major: bool, dtype: torch.dtype) -> Tensor:
        """Aligned for a GPU, or what it stands for."""
        return aligned(stored) if row_major else _dense(stored, scale, dtype)

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], module: str, *, prepack: bool, rows: slice = slice(None)) -> Weight:
        """The tensor itself, not copied unless a GPU needs its rows aligned."""
        matrix, scale = tensors[f"{module}.{cls.suffix}"], tensors[f"{module}.scale"][rows]
        if matrix.dtype != FP8:
            return DenseWeight(matrix[rows], prepack=prepack)
        return cls(matrix if rows == slice(None) else aligned(matrix[rows]), scale)

    @classmethod
    def take_rows(cls, tensors: Mapping[str, Tensor], module: str, rows: Sequence[slice]) -> dict[str, Tensor]:
        """Of the matrix and of the scales."""
        matrix, scale = tensors[f"{module}.{cls.suffix}"].view(torch.uint8), tensors[f"{module}.scale"]
        return {
            cls.suffix: torch.cat([matrix[part] for part in rows]).view(FP8),
            "scale": torch.cat([scale[part] for part in rows]),
        }

    @property
    def num_bytes(self) -> int:
        """Of matrix and scales."""
        return self._matrix.nbytes + self._scale.nbytes

    def products(
        self, bias: Tensor | None, activation: ProductActivation | None = None, *, ragged: bool = True
    ) -> Products:
        """See `row_major_products`."""
        return row_major_products(self._matrix, self._scale, bias, activation)


def _dense(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`[out_features, in_features]` of `dtype`, rounded once."""
    dense = torch.empty_like(stored, dtype=dtype)
    parts = (torch.split(each, ROWS_AT_A_TIME) for each in (dense, stored, scale))
    for rows, numbers, scales in zip(*parts, strict=True):
        rows.copy_(numbers.float().mul_(scales[:, None]))
    return dense
