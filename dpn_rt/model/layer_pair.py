"""Two layers that ranks share: each rank has some outputs of the first, and the inputs of the second that these become.

So between the two nothing needs to be told, whether it is attention over whole heads or an activation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dpn_rt.model.weights.dense import DenseWeight
from dpn_rt.model.weights.forms import form_of
from dpn_rt.model.weights.tiles import TILE_ROWS
from dpn_rt.schema.dtypes import Quantize

NamedTensors = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class LayerPair:
    """A column-parallel layer and the row-parallel one after it. Their names are those of modules."""

    first: str
    widths: tuple[int, ...]
    """Outputs of each part of `first`, one below the other: queries, keys, values. The inputs of `second` are as many
    as those of the first part."""
    second: str
    out_features: int
    """Outputs of `second`."""
    unit: int = 1
    """Outputs of `first` that stay together: of a head."""

    def divides(self, quantize: Quantize, size: int) -> bool:
        """Whether every rank can have the same share.

        Args:
            quantize: form of the engine's matrices: those in 8 or 4 bits are cut between tiles of 16 rows.
            size: number of ranks.
        """
        tiled = () if quantize == "none" else (*self.widths, self.out_features)
        of_units = not any(width % (size * self.unit) for width in self.widths)
        return of_units and not any(count % (size * TILE_ROWS) for count in tiled)

    def tensors(self, weights: Mapping[str, Tensor], rank: int, size: int) -> NamedTensors:
        """Canonical name -> a rank's part, copied.

        Args:
            weights: of the engine.
            rank: from 0.
            size: number of ranks. Where a part has fewer units, several ranks have the same one.
        """
        rows = even_parts(self.widths, self.unit, rank, size)
        yield from take_rows(weights, self.first, rows)
        if form_of(weights, self.second) is not DenseWeight:
            yield from take_rows(weights, self.second, even_parts((self.out_features,), 1, rank, size))
            return
        yield f"{self.second}.weight", weights[f"{self.second}.weight"][:, rows[0]].clone()
        bias = weights.get(f"{self.second}.bias")
        if bias is not None and rank == 0:  # the sum over the ranks has it once
            yield f"{self.second}.bias", bias.clone()


def even_parts(widths: Sequence[int], unit: int, rank: int, size: int) -> list[slice]:
    """A rank's share of each of several parts, one below the other; at least one unit."""
    parts, start = [], 0
    for width in widths:
        num_units = width // unit
        first, count = rank * num_units // size, max(1, num_units // size)
        parts.append(slice(start + first * unit, start + (first + count) * unit))
        start += width
    return parts


def take_rows(weights: Mapping[str, Tensor], module: str, rows: Sequence[slice]) -> NamedTensors:
    """Some rows of a layer, or of a table, and of its bias, copied."""
    for suffix, tensor in form_of(weights, module).take_rows(weights, module, rows).items():
        yield f"{module}.{suffix}", tensor
    bias = weights.get(f"{module}.bias")
    if bias is not None:
        yield f"{module}.bias", DenseWeight.take_rows({"bias.weight": bias}, "bias", rows)["weight"]
