"""What is trained, in which order and for how long: every number of the recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from examples.tiny_dpn.model import Variant

PhaseName = Literal["tower", "base", "dense", "static", "dpn"]


@dataclass(frozen=True, slots=True)
class Routing:
    """How the routers learn."""

    policy_weight: float
    """Of the policy gradient (see `routing.py`)."""
    evenness_weight: float
    """Of the loss that keeps every expert possible."""
    compression_weight: float
    """Of the routing loss; published 0.001."""
    score: Literal["best", "expected"]
    """The routing loss scores the most probable expert (published) or all of them by their probability."""
    target: float
    """Hinge of the routing loss; published 1.5."""
    draws: int
    """Routes drawn for each question of a step."""
    learning_rate: float
    """Of the routers' last layer, whose logits are divided by 10: it needs large weights."""
    hidden_learning_rate: float
    """Of the layer before it. At a high rate all its units end up negative for some questions, and dead."""
    first_step: int
    """Until then routes are drawn evenly, so that the decoder learns to live with each before they are judged."""
    detach: bool
    """Routers read the decoder's rows, and leave them as they are."""
    min_drawn_visual_tokens: int
    """An expert that would leave fewer is drawn again; published 18 of 576."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One run of the optimizer."""

    name: PhaseName
    variant: Variant
    start: PhaseName | None
    """The phase whose weights it starts from; None: random weights."""
    steps: int
    scenes: int
    """Pictures per step."""
    questions: int
    """Questions per picture; 0 trains the tower alone."""
    learning_rate: float
    tower_learning_rate: float
    """Lower than the decoder's once the tower can see: gradients of a decoder that knows nothing would undo that."""
    warmup_steps: int
    practice_scenes: int = 0
    """More pictures per step, to practise on (see `practice.py`)."""
    practice_until: int = 0
    """The first step without them."""
    patch_weight: float = 0.0
    """Of the patch reading loss."""
    early_answer_weight: float = 0.0
    """Of the losses that ask for answers after the layers that routers will read (see `early_answers.py`)."""
    router_token: bool = True
    """Questions end in `<ROUTER>`. The base has seen it before it means anything; models without routers are asked
    without it, by the runtime too."""
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
"""What the variants have in common: equal budgets, so that they can be compared."""

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
