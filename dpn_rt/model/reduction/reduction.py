"""What the rest of the runtime asks of a reduction's configuration, whatever its method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from dpn_rt.schema.weights import NamedSpecs

Grid = tuple[int, int]
"""Rows and columns of the visual tokens of one image."""


class Reduction(Protocol):
    """How visual rows are reduced between the stages of a model. Configuration: frozen, no tensors."""

    @property
    def method(self) -> str:
        """The tag of its class in `engine.json`."""

    @property
    def summary(self) -> str:
        """A few words for people, such as "adaptive pooling"."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers whose output is reduced, ascending: one boundary each."""

    @property
    def num_experts(self) -> tuple[int, ...]:
        """Experts that a route can force, per boundary."""

    @property
    def reads_router_rows(self) -> bool:
        """Whether a prompt must say which rows a router reads."""

    @property
    def use_router_token(self) -> bool:
        """Whether these are the rows of `<ROUTER>` tokens; else the last row of the prompt."""

    def weight_specs(self, hidden_size: int, dtype: torch.dtype) -> NamedSpecs:
        """Its weights, in the order of the file."""

    def problems(self, hidden_size: int, grid: Grid | None) -> Iterator[str]:
        """What contradicts itself or the model.

        Args:
            hidden_size: of the decoder.
            grid: of the vision encoder's visual tokens; None without an encoder, or where they are no grid.
        """

    def draw(self, seed: int | None) -> Sequence[int] | None:
        """Experts drawn for one request; None where a router or the configuration decides."""

    def most_rows(self, num_rows: int, grids: Sequence[Grid], forced: Sequence[int]) -> tuple[int, ...]:
        """Rows that a sequence has at most in each stage: exact where all choices are known beforehand.

        Args:
            num_rows: at stage 0.
            grids: of its images, at stage 0.
            forced: expert per boundary, -1 where it is not known.
        """


@dataclass(frozen=True, slots=True)
class NoReduction:
    """A dense model: one stage."""

    method: Literal["none"] = "none"

    @property
    def summary(self) -> str:
        return "dense"

    @property
    def layers(self) -> tuple[int, ...]:
        return ()

    @property
    def num_experts(self) -> tuple[int, ...]:
        return ()

    @property
    def reads_router_rows(self) -> bool:
        return False

    @property
    def use_router_token(self) -> bool:
        return False

    def weight_specs(self, hidden_size: int, dtype: torch.dtype) -> NamedSpecs:
        """None."""
        yield from ()

    def problems(self, hidden_size: int, grid: Grid | None) -> Iterator[str]:
        """None."""
        yield from ()

    def draw(self, seed: int | None) -> Sequence[int] | None:
        """Nothing to draw."""
        return None

    def most_rows(self, num_rows: int, grids: Sequence[Grid], forced: Sequence[int]) -> tuple[int, ...]:
        """All rows."""
        return (num_rows,)
