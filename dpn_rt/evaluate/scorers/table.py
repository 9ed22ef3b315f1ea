"""The names of the benchmarks."""

from __future__ import annotations

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.scorers import exact, gqa, mmbench, mme, pope, scienceqa, seed, textvqa, vizwiz, vqav2
from dpn_rt.evaluate.scorers.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    "exact": exact.BENCHMARK,
    "gqa": gqa.BENCHMARK,
    "mmbench": mmbench.BENCHMARK,
    "mme": mme.BENCHMARK,
    "pope": pope.BENCHMARK,
    "scienceqa": scienceqa.BENCHMARK,
    "seed": seed.BENCHMARK,
    "textvqa": textvqa.BENCHMARK,
    "vizwiz": vizwiz.BENCHMARK,
    "vqav2": vqav2.BENCHMARK,
}
"""Name on the command line -> its rule; each file there states it."""


def benchmark(name: str) -> Benchmark:
    """A benchmark by its name on the command line.

    Raises:
        EvaluationError: there is none of this name.
    """
    if name not in BENCHMARKS:
        raise EvaluationError(f"benchmark {name!r:.100}: expected {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
