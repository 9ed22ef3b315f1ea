"""PyramidDrop (arXiv 2410.17247): before each listed layer only the visual rows stay that it would attend to most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from dpn_rt.model.reduction.grid import Grid, IntArray
from dpn_rt.model.reduction.step import Scores, keeps_share, share_text


@dataclass(frozen=True)
class PyramidDrop:
    """A `Step`. The defaults are the paper's."""

    before: tuple[int, ...] = (8, 16, 24)
    """Layers that see fewer rows than the one before; the attention that each would have ranks the rows."""
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    """Share of the original visual rows that is kept, per layer."""
    method: Literal["pyramiddrop"] = "pyramiddrop"
    scores: ClassVar[Scores | None] = "next"
    keeps_positions: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer - 1 for layer in self.before)

    def grid_after(self, index: int, first: Grid, grid: Grid) -> Grid:
        """Rounded down, as published."""
        return 1, int(first[0] * first[1] * self.ratios[index])

    def choose(self, image: int, grid: Grid, num_kept: int) -> IntArray | None:
        """Scores decide."""
        return None

    def problems(self, num_layers: int) -> Iterator[str]:
        """See `Step`."""
        if not self.before or len(self.before) != len(self.ratios):
            both = f"layers={_joined(self.before)}, ratios={_joined(self.ratios)}"
            yield f"{both}: expected as many of both, at least one"
        if not all(1 <= layer < num_layers for layer in self.before):
            yield f"layers={_joined(self.before)}: expected layers from 1 to {num_layers - 1}"
        if list(self.before) != sorted(set(self.before)):
            yield f"layers={_joined(self.before)}: expected them to rise"
        for ratio in self.ratios:
            yield from keeps_share("ratios", ratio)
        if list(self.ratios) != sorted(self.ratios, reverse=True):
            yield f"ratios={_joined(self.ratios)}: expected none above the one before, since rows never come back"

    @property
    def spec(self) -> str:
        return f"pyramiddrop:layers={_joined(self.before)},ratios={_joined(self.ratios)}"


def _joined(values: tuple[float, ...]) -> str:
    return "-".join(str(value) if isinstance(value, int) else share_text(value) for value in values)
