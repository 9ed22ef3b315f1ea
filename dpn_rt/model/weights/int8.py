"""A weight in 8-bit integers, one scale a row, multiplied with rows that are rounded to 8 bits as well (W8A8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.model.weights.product import Products, one_product, tiled_product
from dpn_rt.model.weights.row_major import aligned, row_major_products
from dpn_rt.model.weights.tiles import INT8_TILE, pack_int8, panels_of, tile_shape, unpack_int8
from dpn_rt.model.weights.weight import Number
from dpn_rt.schema.activation import ProductActivation
from dpn_rt.schema.weights import WeightSpec

LEAST, LARGEST = -128, 127


class Int8Weight:
    """A `QuantizedWeight`: tiles of 16 rows and 4 columns, in the order in which processors multiply them.

    A GPU has it row by row, as int8.
    """

    suffix: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8
    number: ClassVar[Number] = "integer"
    least: ClassVar[int] = LEAST
    largest: ClassVar[int] = LARGEST
    group: ClassVar[int | None] = None

    def __init__(self, stored: Tensor, scale: Tensor) -> None:
        """`stored`: uint8 tiles, see `ops.linear_int8`; or an int8 matrix, see `row_major_products`."""
        self._stored, self._scale = stored, scale

    @classmethod
    def specs(cls, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, WeightSpec]:
        """Tiles, and the scale of each row."""
        shape = tile_shape(out_features, in_features, INT8_TILE)
        return {cls.suffix: WeightSpec(shape, torch.uint8), "scale": WeightSpec((out_features,), torch.float32)}

    @classmethod
    def quantize(cls, weight: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        """Without scales, the largest value of a row becomes 127 or -127, and a row of zeros has the scale 0."""
        weight = weight.float()
        scale = weight.abs().amax(1) / LARGEST if scale is None else scale.float()
        rounded = torch.round(weight / torch.where(scale == 0, 1.0, scale)[:, None]).clamp_(LEAST, LARGEST)
        return {cls.suffix: pack_int8(rounded.to(torch.int8)), "scale": scale}

    @classmethod
    def arrange(cls, stored: Tensor, scale: Tensor, *, row_major: bool, dtype: torch.dtype) -> Tensor:
        """Tiles, or the int8 matrix that they hold, aligned."""
        return aligned(unpack_int8(stored)) if row_major else stored

    @classmethod
    def load(
        cls, tensors: Mapping[str, Tensor], module: str, *, prepack: bool, rows: slice = slice(None)
    ) -> Int8Weight:
        """The stored tensor itself, not copied unless `rows` cuts tiles, or a GPU needs them aligned."""
        tiles, scale = tensors[f"{module}.{cls.suffix}"], tensors[f"{module}.scale"]
        first, end, _ = rows.indices(len(scale))
        if (first, end) == (0, len(scale)):
            return cls(tiles, scale)
        if tiles.dtype == torch.int8:
            return cls(aligned(tiles[first:end]), scale[first:end])
        height = INT8_TILE[0]
        if first % height == 0 and end % height == 0:
            return cls(tiles[first // height : end // height], scale[first:end])
        return cls(pack_int8(unpack_int8(tiles)[first:end]), scale[first:end])

    @classmethod
    def take_rows(cls, tensors: Mapping[str, Tensor], module: str, rows: Sequence[slice]) -> dict[str, Tensor]:
        """Whole tiles, and the scales of their rows."""
        tiles, scale = tensors[f"{module}.{cls.suffix}"], tensors[f"{module}.scale"]
        panels = [panels_of(part) for part in rows]
        return {
            cls.suffix: torch.cat([tiles[part] for part in panels]),
            "scale": torch.cat([scale[part] for part in rows]),
        }

    @property
    def num_bytes(self) -> int:
        """Of matrix and scales."""
        return self._stored.nbytes + self._scale.nbytes

    def products(
        self, bias: Tensor | None, activation: ProductActivation | None = None, *, ragged: bool = True
    ) -> Products:
        """One kernel for any number of rows, or a library's."""
        if self._stored.dtype == torch.int8:
            return row_major_products(self._stored, self._scale, bias, activation)
        operands = {"weight": self._stored, "scale": self._scale, "bias": bias}
        return one_product(tiled_product(ops.linear_int8, len(self._scale), activation, **operands))
