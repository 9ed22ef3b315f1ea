"""What is known of a boundary's work on one sequence before the boundary is reached."""

from __future__ import annotations

from dataclasses import dataclass

from dpn_rt.model.reduction.grid import IntArray, Segments
from dpn_rt.model.reduction.step import Cut

UNFORCED = -1
"""Expert where the router decides."""


@dataclass(frozen=True, eq=False)
class Choice:
    """One boundary, one sequence. The defaults leave everything to the boundary's own configuration."""

    expert: int = UNFORCED
    """Expert of a routed boundary that is forced."""
    cut: Cut | None = None
    """What a training-free method does here; None: nothing."""
    before: tuple[Segments, ...] = ()
    """Visual rows of each image before the cut."""
    after: tuple[Segments, ...] = ()
    """Visual rows of each image after the cut."""
    kept: tuple[IntArray, ...] | None = None
    """`[n]` ascending rows of each image that stay, counted among those that reach the boundary; None: the cut
    decides."""
