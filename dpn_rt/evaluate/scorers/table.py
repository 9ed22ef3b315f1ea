"""The names of the benchmarks."""

from __future__ import annotations

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.scorers import exact, pope
from dpn_rt.evaluate.scorers.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    "exact": exact.BENCHMARK,
    "pope": pope.BENCHMARK,
}


def benchmark(name: str) -> Benchmark:
    """A benchmark by its name on the command line.

    Raises:
        EvaluationError: there is none of this name.
    """
    if name not in BENCHMARKS:
        raise EvaluationError(f"benchmark {name!r:.100}: expected {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
