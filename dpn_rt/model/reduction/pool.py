"""Uniform pooling of the grid of visual rows, before the decoder or at one of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from dpn_rt.model.reduction.grid import Grid, IntArray, pooled_grid
from dpn_rt.model.reduction.step import Scores, has_layers_after


@dataclass(frozen=True)
class Pool:
    """A `Step`. A kernel that is higher or wider than an image's grid leaves the image as it is."""

    kernel: tuple[int, int] = (2, 2)
    """Height and width; strides are the same, and what is left over at the grid's end is dropped."""
    layer: int = 0
    """The first layer that sees fewer rows; 0: all of them."""
    function: Literal["avg", "max"] = "avg"
    method: Literal["pool"] = "pool"
    scores: ClassVar[Scores | None] = None
    keeps_positions: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer - 1,)

    def grid_after(self, index: int, first: Grid, grid: Grid) -> Grid:
        """See `Step`."""
        after, fits = pooled_grid(grid, self.kernel)
        return after if fits else grid

    def choose(self, image: int, grid: Grid, num_kept: int) -> IntArray | None:
        """Nothing is chosen: rows are pooled."""
        return None

    def problems(self, num_layers: int) -> Iterator[str]:
        """See `Step`."""
        yield from has_layers_after("layer", self.layer, num_layers)
        if min(self.kernel) < 1 or max(self.kernel) > 1024:
            yield f"kernel={self.kernel[0]}x{self.kernel[1]}: expected sides from 1 to 1024"

    @property
    def spec(self) -> str:
        return f"pool:kernel={self.kernel[0]}x{self.kernel[1]},layer={self.layer},function={self.function}"
