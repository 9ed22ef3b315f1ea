"""A weight in 4 bits, one scale for 128 columns of a row, multiplied with rows that are rounded to 8 bits (W4A8)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt import ops
from dpn_rt.model.weights.product import Products, activated, one_product, tiled_product
from dpn_rt.model.weights.tiles import GROUP, INT4_TILE, pack_int4, panels_of, tile_shape, unpack_int4
from dpn_rt.model.weights.weight import Number
from dpn_rt.schema.activation import ProductActivation
from dpn_rt.schema.weights import WeightSpec

LEAST, LARGEST = -8, 7
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Scales that are tried for each group, as shares of the one that reaches its largest value."""
ROWS_AT_A_TIME = 1024
"""Rows that are quantised together, which bounds the memory."""


class Int4Weight:
    """A `QuantizedWeight`: tiles of 16 rows and 8 columns, in the order in which processors multiply them.

    A matrix whose rows are no multiple of 16 is not stored in this form.
    """

    suffix: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
    number: ClassVar[Number] = "integer"
    least: ClassVar[int] = LEAST
    largest: ClassVar[int] = LARGEST
    group: ClassVar[int | None] = GROUP

    def __init__(self, tiles: Tensor, scale: Tensor, num_rows: int) -> None:
        """As `ops.linear_int4` takes them; only the first `num_rows` rows are asked for."""
        self._tiles, self._scale, self._num_rows = tiles, scale, num_rows

    @classmethod
    def specs(cls, out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, WeightSpec]:
        """Tiles, and the scale of each row and group."""
        shape = tile_shape(out_features, in_features, INT4_TILE)
        groups = -(-in_features // GROUP)
        return {
            cls.suffix: WeightSpec(shape, torch.uint8),
            "scale": WeightSpec((shape[0], groups, INT4_TILE[0]), torch.bfloat16),
        }

    @classmethod
    def quantize(cls, weight: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        """Without scales, each group takes the one that leaves the least squared error of those that `_candidates`
        makes. Given ones are rounded to bfloat16."""
        rows = torch.split(weight, ROWS_AT_A_TIME)
        given = [None] * len(rows) if scale is None else torch.split(scale, ROWS_AT_A_TIME)
        parts = [_quantize_rows(*each) for each in zip(rows, given, strict=True)]
        q, scale = (torch.cat(each) for each in zip(*parts, strict=True))
        return {cls.suffix: pack_int4(q), "scale": _tiled(scale)}

    @classmethod
    def arrange(cls, stored: Tensor, scale: Tensor, *, row_major: bool, dtype: torch.dtype) -> Tensor:
        """The tiles themselves: only our kernels of the CPU take 4 bits."""
        assert not row_major, "weights in 4 bits run on the CPU alone"
        return stored

    @classmethod
    def load(
        cls, tensors: Mapping[str, Tensor], module: str, *, prepack: bool, rows: slice = slice(None)
    ) -> Int4Weight:
        """The tiles themselves, not copied unless `rows` cuts some."""
        tiles, scale = tensors[f"{module}.{cls.suffix}"], tensors[f"{module}.scale"]
        height = INT4_TILE[0]
        first, end, _ = rows.indices(height * len(tiles))
        if first % height == 0 and end % height == 0:
            return cls(tiles[first // height : end // height], scale[first // height : end // height], end - first)
        part = functional.pad(_rows_of(scale)[first:end], (0, 0, 0, -(end - first) % height))
        return cls(pack_int4(unpack_int4(tiles)[first:end]), _tiled(part), end - first)

    @classmethod
    def take_rows(cls, tensors: Mapping[str, Tensor], module: str, rows: Sequence[slice]) -> dict[str, Tensor]:
        """Whole tiles, and the scales of their rows."""
        tiles, scale = tensors[f"{module}.{cls.suffix}"], tensors[f"{module}.scale"]
        panels = [panels_of(part) for part in rows]
        return {
            name: torch.cat([each[part] for part in panels]) for name, each in ((cls.suffix, tiles), ("scale", scale))
        }

    @property
    def num_bytes(self) -> int:
        """Of tiles and scales."""
        return self._tiles.nbytes + self._scale.nbytes

    def products(
        self, bias: Tensor | None, activation: ProductActivation | None = None, *, ragged: bool = True
    ) -> Products:
        """One kernel for any number of rows."""
        num_rows, padding = self._num_rows, -self._num_rows % INT4_TILE[0]
        if bias is not None and padding:
            bias = functional.pad(bias, (0, padding))
        if not padding:
            operands = {"weight": self._tiles, "scale": self._scale, "bias": bias}
            return one_product(tiled_product(ops.linear_int4, num_rows, activation, **operands))
        padded = partial(ops.linear_int4, weight=self._tiles, scale=self._scale, bias=bias)
        return one_product(activated(lambda x: padded(x)[:, :num_rows].contiguous(), activation))


def _tiled(scale: Tensor) -> Tensor:
    """`[out_features, groups]` -> `[out_features / 16, groups, 16]`."""
    return scale.view(-1, INT4_TILE[0], scale.shape[1]).transpose(1, 2).contiguous()


def _rows_of(scale: Tensor) -> Tensor:
    """The scales of `_tiled` by rows."""
    return scale.transpose(1, 2).flatten(0, 1)


def _quantize_rows(weight: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """`[num_rows, in_features]` -> the same in int8, -8 to 7, and scales `[num_rows, groups]` bfloat16."""
    num_rows, num_columns = weight.shape
    groups = functional.pad(weight.float(), (0, -num_columns % GROUP)).view(num_rows, -1, GROUP)
    best = torch.zeros(groups.shape, dtype=torch.int8, device=groups.device)
    best_scale = torch.zeros(groups.shape[:2], dtype=torch.bfloat16, device=groups.device)
    least = torch.full(groups.shape[:2], torch.inf, device=groups.device)
    for candidate in _candidates(groups) if given is None else (given,):
        scale = candidate.bfloat16()
        exact = scale.float()[..., None]
        q = torch.round(groups / torch.where(exact == 0, 1.0, exact)).clamp_(LEAST, LARGEST)
        error = (q * exact - groups).square_().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better[..., None], q.to(torch.int8), best)
        best_scale = torch.where(better, scale, best_scale)
    return best.view(num_rows, -1)[:, :num_columns].contiguous(), best_scale


def _candidates(groups: Tensor) -> Iterator[Tensor]:
    """Scales `[num_rows, num_groups]`: the largest value becomes -8 (of the other sign, the scale is negative) or 7, or
    a little more than that, which is then cut off."""
    least, largest = groups.aminmax(dim=-1)
    extreme = torch.where(largest > -least, largest, least)
    for shrink in SHRINKS:
        yield shrink * extreme / LEAST
        yield shrink * extreme / LARGEST
