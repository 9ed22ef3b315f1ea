"""What the rest of the runtime asks of a reduction's configuration, whatever its method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from dpn_rt.model.reduction.choice import Choice
from dpn_rt.model.reduction.grid import Grid, IntArray, Segments
from dpn_rt.model.reduction.step import Cut
from dpn_rt.schema.weights import NamedSpecs


class Steps(Protocol):
    """A chain of training-free methods that a request asks for."""

    @property
    def cuts(self) -> Sequence[Cut]:
        """Its boundaries."""


class Asked(Protocol):
    """What a request says about its reduction."""

    @property
    def route(self) -> Sequence[int | None] | None:
        """Expert per boundary, None where the router decides."""

    @property
    def reduction(self) -> Steps | None:
        """None: what the engine's configuration says."""

    @property
    def segments(self) -> Sequence[Segments]:
        """Of each image, at stage 0."""

    @property
    def kept(self) -> Sequence[Sequence[IntArray]] | None:
        """Per boundary of the chain and image the ascending rows that stay, counted among those that reach the
        boundary; None: the chain decides."""


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
    def needs_grid(self) -> bool:
        """Whether the visual tokens of an image must be its grid and nothing else."""

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

    def choices(self, asked: Asked, seed: int | None) -> Sequence[Choice]:
        """What is known of each boundary's work on one request.

        Args:
            asked: of the request.
            seed: of the request, for what is drawn.
        """

    def most_rows(self, num_rows: int, images: Sequence[Segments], choices: Sequence[Choice]) -> tuple[int, ...]:
        """Rows that a sequence has at most in each stage: exact where all choices are known beforehand.

        Args:
            num_rows: at stage 0.
            images: grids of each, at stage 0.
            choices: per boundary.
        """


@dataclass(frozen=True)
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
    def needs_grid(self) -> bool:
        return False

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

    def choices(self, asked: Asked, seed: int | None) -> Sequence[Choice]:
        """There is no boundary."""
        return ()

    def most_rows(self, num_rows: int, images: Sequence[Segments], choices: Sequence[Choice]) -> tuple[int, ...]:
        """All rows."""
        return (num_rows,)
