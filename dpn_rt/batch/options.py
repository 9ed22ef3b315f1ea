"""How the rows of a table are answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpn_rt.sampling.params import SamplingParams

LLM_LIMITS = ("max_model_len", "limit_mm_per_prompt")
"""The arguments of `LLM` that decide which rows are answered, and how far. All others are about memory, speed and how
many run at a time: with them answers are the same, up to rounding."""


@dataclass(frozen=True)
class AnswerOptions:
    """What an answer depends on, and where its question stands."""

    engine: Path
    sampling: SamplingParams
    image_column: str = "image"
    question_column: str = "question"
    route: tuple[int | None, ...] | None = None
    router_bias: float | None = None
    reduce: str | None = None
    """SPEC of a training-free reduction; None: what the engine was built with."""
    llm_options: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of `LLM`."""
