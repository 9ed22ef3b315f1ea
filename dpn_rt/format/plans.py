"""The part of `engine.json` about TensorRT plans: their version, GPUs and limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from dpn_rt.errors import ConfigError
from dpn_rt.schema.bounds import Count, Positions

Flavor = Literal["rtx", "enterprise"]
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class PlanLimits:
    """Largest inputs that the plans were built for."""

    max_batch: Count
    """Sequences that decode together; also the number of slots of the KV caches."""
    max_prefill_batch: Count
    """Sequences that are prefilled together."""
    stage_rows: tuple[Positions, ...]
    """Per stage, rows of one sequence with prompt and answer: the length of the stage's KV caches."""


@dataclass(frozen=True)
class PlanConfig:
    """The plans of one engine."""

    flavor: Flavor
    version: str
    """Version of the TensorRT that built the plans; no other version reads them."""
    compute_capabilities: tuple[str, ...]
    """Compute capabilities of the GPUs that the plans run on, such as `8.6`."""
    limits: PlanLimits


@dataclass(frozen=True)
class BuiltPlans:
    """The plans that a builder has made."""

    config: PlanConfig
    files: Mapping[str, bytes]
    """File name in the engine directory (`plan_file`) -> serialized plan."""


def plan_file(stage: int, phase: Phase) -> str:
    """Path of a plan within the engine directory."""
    return f"plans/stage{stage}.{phase}.plan"


def plan_files(num_stages: int) -> list[str]:
    """Paths of all plans of an engine, within its directory."""
    return [plan_file(stage, phase) for stage in range(num_stages) for phase in PHASES]


def check_limits(limits: PlanLimits, num_stages: int, max_position_embeddings: int) -> None:
    """Refuse limits that no plan could be built for.

    Raises:
        ConfigError: every problem found, in one message.
    """
    problems = []
    if limits.max_batch < 1:
        problems.append(f"max batch {limits.max_batch}: expected at least 1")
    if not 1 <= limits.max_prefill_batch <= max(1, limits.max_batch):
        problems.append(f"max prefill batch {limits.max_prefill_batch}: expected 1 to the max batch {limits.max_batch}")
    if len(limits.stage_rows) != num_stages:
        problems.append(f"rows for {len(limits.stage_rows)} stages {list(limits.stage_rows)}: expected {num_stages}")
    wrong = [rows for rows in limits.stage_rows if not 1 <= rows <= max_position_embeddings]
    if wrong:
        problems.append(f"rows per stage {wrong}: expected 1 to the model's length {max_position_embeddings}")
    if problems:
        raise ConfigError("; ".join(problems))
