"""Random visual rows: the baseline that every method has to beat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from dpn_rt.model.reduction.grid import Grid, IntArray
from dpn_rt.model.reduction.step import Scores, has_layers_after, keeps_share, share_text

MOST_SEED = 2**53
"""That engine.json can hold."""


@dataclass(frozen=True)
class RandomKeep:
    """A `Step`."""

    layer: int = 0
    """The first layer that sees fewer rows; 0: all of them."""
    keep: float = 0.5
    """Share of the visual rows that is kept, rounded half to even."""
    seed: int = 0
    """The same seed keeps the same rows of as many."""
    positions: Literal["keep", "renumber"] = "renumber"
    method: Literal["random"] = "random"
    scores: ClassVar[Scores | None] = None
    needs_grid: ClassVar[bool] = False

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer - 1,)

    @property
    def keeps_positions(self) -> bool:
        return self.positions == "keep"

    def grid_after(self, index: int, first: Grid, grid: Grid) -> Grid:
        """See `Step`."""
        return 1, round(grid[0] * grid[1] * self.keep)

    def choose(self, image: int, grid: Grid, num_kept: int) -> IntArray | None:
        """Drawn for each image of a prompt by itself."""
        order = np.random.default_rng([self.seed, image]).permutation(grid[0] * grid[1])
        return np.sort(order[:num_kept]).astype(np.int32)

    def problems(self, num_layers: int) -> Iterator[str]:
        """See `Step`."""
        yield from has_layers_after("layer", self.layer, num_layers)
        yield from keeps_share("keep", self.keep)
        if not 0 <= self.seed <= MOST_SEED:
            yield f"seed={self.seed}: expected 0 to {MOST_SEED}"
        if self.layer == 0 and self.positions == "keep":
            yield "positions=keep with layer=0: rows have no positions before the decoder, expected positions=renumber"

    @property
    def spec(self) -> str:
        return f"random:layer={self.layer},keep={share_text(self.keep)},seed={self.seed},positions={self.positions}"
