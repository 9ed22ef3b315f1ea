"""Training-free reduction as a configuration: steps one after the other, and the boundaries that an engine has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dpn_rt.model.reduction.choice import Choice
from dpn_rt.model.reduction.divprune import DivPrune
from dpn_rt.model.reduction.fastv import FastV
from dpn_rt.model.reduction.grid import Grid, Segments, num_visual
from dpn_rt.model.reduction.pool import Pool
from dpn_rt.model.reduction.pyramiddrop import PyramidDrop
from dpn_rt.model.reduction.random import RandomKeep
from dpn_rt.model.reduction.reduction import Asked
from dpn_rt.model.reduction.step import BEFORE_LLM, Cut, Step
from dpn_rt.schema.weights import NamedSpecs

StepConfig = FastV | PyramidDrop | RandomKeep | Pool | DivPrune
"""The `method` of each tells them apart; a further method joins this union."""


@dataclass(frozen=True)
class Chain:
    """A `Reduction` without weights: each step reduces what the one before has left."""

    steps: tuple[StepConfig, ...]
    """At ascending boundaries; none: nothing is reduced unless a request says so."""
    boundaries: tuple[int, ...]
    """Layers whose output may be reduced: those of the steps, and those of other chains that requests may ask for."""
    method: Literal["chain"] = "chain"

    @classmethod
    def of(cls, *steps: StepConfig) -> Chain:
        """A chain with its own boundaries alone."""
        chain = cls(steps, ())
        return replace(chain, boundaries=tuple(cut.layer for cut in chain.cuts if cut.layer != BEFORE_LLM))

    @property
    def spec(self) -> str:
        """As a SPEC, with all keys."""
        return "+".join(step.spec for step in self.steps) or "none"

    @property
    def summary(self) -> str:
        return self.spec

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Every boundary of every step, in order."""
        return tuple(Cut(step, index) for step in self.steps for index in range(len(step.layers)))

    @property
    def before_llm(self) -> Step | None:
        """The step that reduces rows before the decoder sees them."""
        return self.steps[0] if self.steps and self.steps[0].layers == (BEFORE_LLM,) else None

    @property
    def layers(self) -> tuple[int, ...]:
        return self.boundaries

    @property
    def needs_grid(self) -> bool:
        return bool(self.steps or self.boundaries)

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
        """Of the steps; that they fit the decoder's layers is checked where a SPEC is read."""
        missing = [cut.layer for cut in self.cuts if cut.layer not in (BEFORE_LLM, *self.boundaries)]
        if missing:
            yield f"{self.spec}: its boundary after layer {missing[0]} is none of {list(self.boundaries)}"

    def choices(self, asked: Asked, seed: int | None) -> Sequence[Choice]:
        """Per boundary, with the rows that it leaves; a random step has its own seed."""
        chain = asked.reduction or self
        first = before = tuple(asked.segments)
        found = {}
        cuts = [cut for cut in chain.cuts if cut.layer != BEFORE_LLM]
        for position, cut in enumerate(cuts):
            first = before if cut.index == 0 else first
            after = tuple(cut.segments_after(*pair) for pair in zip(first, before, strict=True))
            kept = None if asked.kept is None or cut.step.needs_grid else tuple(asked.kept[position])
            found[cut.layer] = Choice(cut=cut, before=before, after=after, kept=kept)
            before = after
        return [found.get(layer, Choice()) for layer in self.boundaries]

    def most_rows(self, num_rows: int, images: Sequence[Segments], choices: Sequence[Choice]) -> tuple[int, ...]:
        """See `Reduction`; exact."""
        rows = [num_rows]
        for choice in choices:
            removed = sum(map(num_visual, choice.before)) - sum(map(num_visual, choice.after))
            rows.append(rows[-1] - removed)
        return tuple(rows)


def chain_problems(chain: Chain, num_layers: int) -> Iterator[str]:
    """What is out of range, or contradicts itself.

    Args:
        chain: with any values.
        num_layers: of the decoder.
    """
    has_grid = True
    for step in chain.steps:
        yield from (f"{step.method}: {problem}" for problem in step.problems(num_layers))
        if step.needs_grid and not has_grid:
            yield f"{step.method}: the step before leaves rows that are no grid"
        has_grid = has_grid and step.needs_grid
    layers = [cut.layer for cut in chain.cuts]
    if layers != sorted(set(layers)):
        yield f"{chain.spec}: expected steps whose layers rise"
