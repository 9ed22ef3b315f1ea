"""One training-free method within a chain: which visual rows it leaves at its boundaries, by rules alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from dpn_rt.model.reduction.grid import Grid, IntArray, Segments, as_grid

Scores = Literal["here", "next"]
"""Attention of the last prompt row: in the boundary's own layer, or as it would be in the layer after it."""

BEFORE_LLM = -1
"""The boundary of rows that no decoder layer has seen yet."""


class Step(Protocol):
    """A method's configuration: frozen, no tensors. Layers count from 0; a boundary is named by the layer before it."""

    @property
    def method(self) -> str:
        """Its name in a SPEC, and the tag of its class in `engine.json`."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Its boundaries, ascending; `BEFORE_LLM` for one before the decoder."""

    @property
    def scores(self) -> Scores | None:
        """What ranks visual rows; None where nothing of the decoder does."""

    @property
    def keeps_positions(self) -> bool:
        """Whether rows after the boundary keep their rotary positions; else they count on from 0."""

    @property
    def needs_grid(self) -> bool:
        """Whether the rows must be a grid when it begins. What it leaves is a grid then, else it is none."""

    def grid_after(self, index: int, first: Grid, grid: Grid) -> Grid:
        """Visual rows of one image after boundary `index` of the step; (1, n) where they are no grid.

        Args:
            index: of its boundaries.
            first: when the step began.
            grid: before this boundary.
        """

    def choose(self, image: int, grid: Grid, num_kept: int) -> IntArray | None:
        """`[num_kept]` ascending rows of the image that stay, where numbers alone decide; None where rows do.

        Args:
            image: its place among the images of its prompt.
            grid: before the boundary.
            num_kept: as `grid_after` gives it.
        """

    def problems(self, num_layers: int) -> Iterator[str]:
        """What is out of range for a decoder of `num_layers`."""

    @property
    def spec(self) -> str:
        """As a SPEC, with all keys."""


@dataclass(frozen=True)
class Cut:
    """One boundary of a step."""

    step: Step
    index: int

    @property
    def layer(self) -> int:
        return self.step.layers[self.index]

    def segments_after(self, first: Segments, segments: Segments) -> Segments:
        """Visual rows of one image after the boundary. Grids are pooled one by one; a method that leaves no grid takes
        its share of the whole image, so that rows of all segments compete.

        Args:
            first: when the step began.
            segments: before this boundary.
        """
        if self.step.needs_grid:
            return tuple(self.step.grid_after(self.index, *pair) for pair in zip(first, segments, strict=True))
        return (self.step.grid_after(self.index, as_grid(first), as_grid(segments)),)


def keeps_share(name: str, value: float) -> Iterator[str]:
    """A problem unless `value` is from 0 to 1."""
    if not 0 <= value <= 1:
        yield f"{name}={share_text(value)}: expected a share from 0 to 1"


def share_text(value: float) -> str:
    """A number in a SPEC: all its digits and no exponent, whose minus sign would separate two ratios."""
    return np.format_float_positional(value, trim="-")


def has_layers_after(name: str, layer: int, num_layers: int) -> Iterator[str]:
    """A problem unless `layer`, the first one that sees fewer rows, is one of the decoder's."""
    if not 0 <= layer < num_layers:
        yield f"{name}={layer}: expected a layer from 0 to {num_layers - 1}"
