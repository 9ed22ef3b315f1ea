"""FastV (arXiv 2403.06764): after layer k - 1, visual rows that the last prompt row attends to least are dropped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from dpn_rt.model.reduction.grid import Grid, IntArray
from dpn_rt.model.reduction.step import Scores, keeps_share, share_text


@dataclass(frozen=True)
class FastV:
    """A `Step`. The defaults are the paper's."""

    k: int = 2
    """Layers that see all rows; attention of the last of them ranks the rows."""
    ratio: float = 0.5
    """Share of the visual rows that is dropped."""
    method: Literal["fastv"] = "fastv"
    scores: ClassVar[Scores | None] = "here"
    keeps_positions: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = False

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.k - 1,)

    def grid_after(self, index: int, first: Grid, grid: Grid) -> Grid:
        """Rounded half to even, as published."""
        return 1, round(grid[0] * grid[1] * (1 - self.ratio))

    def choose(self, image: int, grid: Grid, num_kept: int) -> IntArray | None:
        """Scores decide."""
        return None

    def problems(self, num_layers: int) -> Iterator[str]:
        """See `Step`."""
        if not 1 <= self.k < num_layers:
            yield f"k={self.k}: expected 1 to {num_layers - 1} layers that see all rows"
        yield from keeps_share("ratio", self.ratio)

    @property
    def spec(self) -> str:
        return f"fastv:k={self.k},ratio={share_text(self.ratio)}"
