"""Every number of the training: phases, their order and length, learning rates and weights of losses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from examples.tiny_dpn.model import Variant

PhaseName = Literal["tower", "base", "dense", "static", "dpn"]


@dataclass(frozen=True, slots=True)
class Routing:
    """How the routers learn."""

    policy_weight: float
    """Weight of the policy gradient (see `routing.py`)."""
    evenness_weight: float
    """Weight of the loss that keeps every expert possible."""
    compression_weight: float
    """Weight of the routing loss; published 0.001."""
    score: Literal["best", "expected"]
    """Whether the routing loss scores the most probable expert (published) or all, weighted by probability."""
    target: float
    """Hinge of the routing loss; published 1.5."""
    draws: int
    """Number of routes drawn for each question of a step."""
    learning_rate: float
    """Rate of the routers' last layer. Its logits are divided by 10, so it needs large weights."""
    hidden_learning_rate: float
    """Rate of the layer before it. At a high rate all its units become negative for some questions and die."""
    first_step: int
    """First step with the routing losses. Before it the decoder learns to work with every route."""
    detach: bool
    """Whether the routers' gradient stops at the decoder's rows that they read."""
    min_drawn_visual_tokens: int
    """An expert that would leave fewer visual tokens is drawn again; published 18 of 576."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One run of the optimizer."""

    name: PhaseName
    variant: Variant
    start: PhaseName | None
    """The phase whose weights this one starts from; None for random weights."""
    steps: int
    scenes: int
    """Pictures per step."""
    questions: int
    """Questions per picture; with 0 only the tower is trained."""
    learning_rate: float
    tower_learning_rate: float
    """Lower than the decoder's once the tower is pretrained: an untrained decoder's gradients would undo that."""
    warmup_steps: int
    practice_scenes: int = 0
    """Practice pictures per step, in addition to `scenes` (see `practice.py`)."""
    practice_until: int = 0
    """The first step without practice pictures."""
    patch_weight: float = 0.0
    """Weight of the loss of patch labels."""
    early_answer_weight: float = 0.0
    """Weight of the losses that ask for answers after the layers that routers will read (see `early_answers.py`)."""
    router_token: bool = True
    """Whether questions end with `<ROUTER>`. The base sees the token before any router uses it; models without routers
    are asked without it, here and in the runtime."""
    routing: Routing | None = None


ROUTING = Routing(
    policy_weight=1.0,
    evenness_weight=0.03,
    compression_weight=0.2,
    score="expected",
    target=1.5,
    draws=2,
    learning_rate=1e-2,
    hidden_learning_rate=1e-3,
    first_step=0,
    detach=True,
    min_drawn_visual_tokens=4,
)

VARIANT = Phase(
    name="dense",
    variant="dense",
    start="base",
    steps=600,
    scenes=4,
    questions=5,
    learning_rate=4e-4,
    tower_learning_rate=1e-4,
    warmup_steps=20,
    router_token=False,
)
"""Settings that all variants share. Their budgets are equal, so that they can be compared."""

PHASES: dict[PhaseName, Phase] = {
    phase.name: phase
    for phase in (
        Phase(
            name="tower",
            variant="dense",
            start=None,
            steps=600,
            scenes=32,
            questions=0,
            learning_rate=1e-3,
            tower_learning_rate=1e-3,
            warmup_steps=60,
            patch_weight=1.0,
        ),
        Phase(
            name="base",
            variant="dense",
            start="tower",
            steps=1900,
            scenes=8,
            questions=10,
            learning_rate=1e-3,
            tower_learning_rate=2e-4,
            warmup_steps=50,
            practice_scenes=10,
            practice_until=1000,
            patch_weight=0.3,
            early_answer_weight=0.3,
        ),
        VARIANT,
        replace(VARIANT, name="static", variant="static"),
        replace(VARIANT, name="dpn", variant="dpn", router_token=True, routing=ROUTING),
    )
}
