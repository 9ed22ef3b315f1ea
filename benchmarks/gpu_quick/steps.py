"""The steps in their order, so that a run that is cut short has told the most. Each has seconds of its own."""

from __future__ import annotations

from dataclasses import dataclass

TOTAL_SECONDS = 540
"""Of all steps together; no step runs longer than what is left."""


@dataclass(frozen=True)
class Step:
    """A module `benchmarks.gpu_quick.<name>` with `run(settings, record)`, and the longest it may take."""

    name: str
    seconds: int
    needs_kernels: bool = True
    """Whether it is left out where the build failed."""


STEPS = (
    Step("environment", 45, needs_kernels=False),
    Step("build", 120, needs_kernels=False),
    Step("op_tests", 85),
    Step("model", 85),
    Step("gemm", 30, needs_kernels=False),
    Step("attention", 25),
    Step("sanitize", 70),
    Step("baselines", 50),
    Step("answers", 30),
)
