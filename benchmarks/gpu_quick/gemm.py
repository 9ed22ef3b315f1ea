"""The decoder's matrix products for few and for many rows, by each of torch's libraries, beside the memory's limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from benchmarks.clock import Run, is_cuda
from benchmarks.gpu_quick.record import Recorder
from benchmarks.gpu_quick.settings import Settings
from benchmarks.gpu_quick.timing import cold_seconds, copies_of, shown, told
from benchmarks.shapes import SHAPES
from dpn_rt.schema.weights import TORCH_DTYPES


def run(settings: Settings, record: Recorder) -> None:
    dtype, device = TORCH_DTYPES[settings.dtype], settings.device
    libraries = ("cublas", "cublaslt") if is_cuda(device) else ("cpu",)
    record.say(f"us of a product by {', '.join(libraries)}; GB/s of weights and TFLOP/s of the fastest")
    table = []
    with torch.inference_mode():
        for name, columns, features in products(settings.shape):
            count = copies_of(columns * features * dtype.itemsize, settings.cold_bytes)
            weights = [torch.randn(features, columns, device=device).to(dtype) for _ in range(count)]
            for rows in settings.gemm_rows:
                x = torch.randn(rows, columns, device=device).to(dtype)
                calls = [product(x, weight) for weight in weights]
                found: dict[str, float | str] = {}
                for library in libraries:
                    with preferred(library):
                        found[library] = told(lambda calls=calls: cold_seconds(calls, device))
                best = min((value for value in found.values() if isinstance(value, float)), default=float("nan"))
                table.append({"product": name, "rows": rows, "in": columns, "out": features, "seconds": found})
                record.put(products=table)
                read, flops = columns * features * dtype.itemsize / best, 2 * rows * columns * features / best
                times = " ".join(f"{shown(value):>9}" for value in found.values())
                record.say(f"{name:8} {rows:6} rows {times}  {read / 1e9:6.0f} GB/s {flops / 1e12:6.1f} TFLOP/s")


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
