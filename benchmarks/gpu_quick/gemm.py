"""The decoder's matrix products for few and for many rows, by each of torch's libraries, beside the memory's limit.

Then by other algorithms of cublasLt, which torch does not try.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_quick.cublaslt import Algorithm, CublasLt
from benchmarks.gpu_quick.record import Recorder
from benchmarks.gpu_quick.settings import Settings
from benchmarks.gpu_quick.timing import cold_seconds, copies_of, shown, told
from benchmarks.measuring.clock import Run, is_cuda
from benchmarks.models.shapes import SHAPES
from dpn_rt.schema.weights import TORCH_DTYPES

ALGORITHMS = 8
WORST_DIFFERENCE = 2.0**-6
"""Of a product in 16 bits, relative to its largest element."""


def run(settings: Settings, record: Recorder) -> None:
    dtype, device = TORCH_DTYPES[settings.dtype], settings.device
    libraries = ("cublas", "cublaslt") if is_cuda(device) else ("cpu",)
    record.say(f"us of a product by {', '.join(libraries)}; GB/s of weights and TFLOP/s of the fastest")
    table = []
    with torch.inference_mode():
        for case in cases(settings, dtype):
            found: dict[str, float | str] = {}
            for library in libraries:
                with preferred(library):
                    calls = [product(case.x, weight) for weight in case.weights]
                    found[library] = told(lambda calls=calls: cold_seconds(calls, device))
            table.append(case.sizes | {"seconds": found})
            record.put(products=table)
            times = " ".join(f"{shown(value):>9}" for value in found.values())
            record.say(f"{case.title} {times}  {case.rates(fastest(found.values()))}")
        if is_cuda(device):
            record.attempt("algorithms", lambda: try_algorithms(settings, dtype, record, CublasLt.open(device)))


def try_algorithms(settings: Settings, dtype: torch.dtype, record: Recorder, library: CublasLt) -> None:
    """Times each algorithm that cublasLt's heuristic proposes."""
    record.say(f"us of a product by up to {ALGORITHMS} algorithms of cublasLt, in the heuristic's order")
    table = []
    for case in cases(settings, dtype):
        found: list[float | str] = []
        name = f"algorithms of {case.name} x{len(case.x)}"
        record.attempt(name, partial(time_algorithms, library, case, settings.device, found))
        table.append(case.sizes | {"seconds": found})
        record.put(algorithms=table)
        times = " ".join(f"{shown(value):>9}" for value in found)
        record.say(f"{case.title} {times}  {case.rates(fastest(found))}")


def time_algorithms(library: CublasLt, case: Case, device: str, found: list[float | str]) -> None:
    """Adds the seconds of each algorithm, or why there are none, to `found`."""
    expected, out = F.linear(case.x, case.weights[0]), case.x.new_empty(len(case.x), len(case.weights[0]))
    for algorithm in library.algorithms(case.x, case.weights[0], ALGORITHMS):
        found.append(told(partial(time_algorithm, algorithm, case, out, expected, device)))


def time_algorithm(algorithm: Algorithm, case: Case, out: Tensor, expected: Tensor, device: str) -> float:
    """Seconds of one call.

    Raises:
        ValueError: the result is not that of torch.
    """
    algorithm(case.x, case.weights[0], out.fill_(torch.nan))
    worst = float((out - expected).abs().max() / expected.abs().max())
    if not worst < WORST_DIFFERENCE:
        raise ValueError(f"differs from torch by {worst:.3g} of the largest")
    return cold_seconds([partial(algorithm, case.x, weight, out) for weight in case.weights], device)


@dataclass(frozen=True)
class Case:
    """A product for a number of rows, with several sets of weights, which do not fit the cache together."""

    name: str
    x: Tensor
    """`[rows, columns]`."""
    weights: list[Tensor]
    """Each `[features, columns]`."""

    @property
    def sizes(self) -> dict[str, Any]:
        features, columns = self.weights[0].shape
        return {"product": self.name, "rows": len(self.x), "in": columns, "out": features}

    @property
    def title(self) -> str:
        return f"{self.name:8} {len(self.x):6} rows"

    def rates(self, seconds: float) -> str:
        """GB/s of weights, and TFLOP/s."""
        weight = self.weights[0]
        read, flops = weight.nbytes / seconds, 2 * len(self.x) * weight.numel() / seconds
        return f"{read / 1e9:6.0f} GB/s {flops / 1e12:6.1f} TFLOP/s"


def cases(settings: Settings, dtype: torch.dtype) -> Iterator[Case]:
    """Each product of a layer with each number of rows."""
    for name, columns, features in products(settings.shape):
        count = copies_of(columns * features * dtype.itemsize, settings.cold_bytes)
        weights = [torch.randn(features, columns, device=settings.device).to(dtype) for _ in range(count)]
        for rows in settings.gemm_rows:
            yield Case(name, torch.randn(rows, columns, device=settings.device).to(dtype), weights)


def fastest(found: Iterable[float | str]) -> float:
    """NaN where there is no time."""
    return min((value for value in found if isinstance(value, float)), default=float("nan"))


def products(shape: str) -> Iterator[tuple[str, int, int]]:
    """(name, columns, features) of a decoder layer."""
    sizes = SHAPES[shape]
    head_dim = sizes.hidden_size // sizes.num_heads
    yield "qkv", sizes.hidden_size, (sizes.num_heads + 2 * sizes.num_kv_heads) * head_dim
    yield "o", sizes.num_heads * head_dim, sizes.hidden_size
    yield "gate_up", sizes.hidden_size, 2 * sizes.intermediate_size
    yield "down", sizes.intermediate_size, sizes.hidden_size


def product(x: torch.Tensor, weight: torch.Tensor) -> Run:
    return lambda: F.linear(x, weight)


@contextmanager
def preferred(library: str) -> Iterator[None]:
    """Products by one of torch's libraries for GPUs."""
    if library == "cpu":
        yield
        return
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)
