"""DivPrune (arXiv 2503.02175): the projected visual rows that are most unlike each other, before the decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dpn_rt.model.reduction.grid import Grid, IntArray
from dpn_rt.model.reduction.step import BEFORE_LLM, Scores, keeps_share, share_text


@dataclass(frozen=True)
class DivPrune:
    """A `Step`."""

    keep: float = 0.1
    """Share of the visual rows that is kept, rounded half to even."""
    method: Literal["divprune"] = "divprune"
    scores: ClassVar[Scores | None] = None
    keeps_positions: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False

    @property
    def layers(self) -> tuple[int, ...]:
        return (BEFORE_LLM,)

    def grid_after(self, index: int, first: Grid, grid: Grid) -> Grid:
        """See `Step`."""
        return 1, round(grid[0] * grid[1] * self.keep)

    def choose(self, image: int, grid: Grid, num_kept: int) -> IntArray | None:
        """The rows decide: see `most_diverse`."""
        return None

    def problems(self, num_layers: int) -> Iterator[str]:
        """See `Step`."""
        yield from keeps_share("keep", self.keep)

    @property
    def spec(self) -> str:
        return f"divprune:keep={share_text(self.keep)}"


def most_diverse(rows: Tensor, count: int) -> Tensor:
    """Rows picked one after the other, each as far as possible from those picked before.

    Args:
        rows: `[num_rows, hidden_size]`; distances are 1 - cosine, in float32.
        count: at most `num_rows`.

    Returns:
        `[count]` int64 in the order picked. The first is the one whose nearest other is farthest; ties: the lower one.
    """
    unit = torch.nn.functional.normalize(rows.float(), dim=1)
    distances = 1 - unit @ unit.T
    distances.fill_diagonal_(torch.inf)
    picked = torch.empty(count, dtype=torch.int64, device=rows.device)
    nearest = distances.amin(dim=1)  # of each row to another, and then to those that are picked
    for index in range(count):
        picked[index] = nearest.argmax()
        row = distances.index_select(0, picked[index : index + 1])[0]
        nearest = row.clone() if index == 0 else torch.minimum(nearest, row)
        nearest.index_fill_(0, picked[: index + 1], -torch.inf)
    return picked
