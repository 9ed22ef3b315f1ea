"""Every kernel against the same work in torch and against what this machine can do, measured alternately in one run.

    python benchmarks/ops.py --dtype bfloat16 --json ops.json

Each call takes other inputs, so that they are not in the cache. Medians over the rounds; ratios are taken round by
round. "of limit": the least time for the bytes (at the rate of a copy, or of reads where little is written) and the
FLOPs (at the rate of torch's matrix product), over the kernel's time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file: the repository's root is where `benchmarks` is found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.measuring.clock import Run, is_cuda, replayable, seconds
from benchmarks.measuring.machine import machine
from benchmarks.measuring.result_file import write_json
from benchmarks.op_cases.cases import EPS, LLAVA_1B, LLAVA_7B, Case, KernelShapes, all_cases, int32
from benchmarks.op_cases.convolution import convolution_cases
from benchmarks.op_cases.quantized import quantized_cases, row_major_cases
from benchmarks.op_cases.reduction import reduction_cases
from dpn_rt import ops
from dpn_rt.terminal import escape_output


@dataclass(frozen=True)
class Setting:
    """Sizes that suit a device."""

    shapes: KernelShapes
    limit_bytes: int
    """Moved by one measurement of the memory."""
    cold_bytes: int
    """Inputs of one kernel together: several times the last cache."""
    gemm_rows: int


CPU = Setting(LLAVA_1B, 256 << 20, 96 << 20, 640)
GPU = Setting(LLAVA_7B, 8 << 30, 512 << 20, 8192)


def limit_runs(setting: Setting, dtype: torch.dtype) -> dict[str, tuple[Run, float]]:
    """Rates of this machine: name -> (work, amount of it in bytes or FLOPs)."""
    block = torch.ones(setting.limit_bytes // 8, dtype=torch.int64)
    half = block[: block.numel() // 2]
    target = torch.empty_like(half)
    left, right = torch.randn(setting.gemm_rows, 4096).to(dtype), torch.randn(4096, 4096).to(dtype)
    # Reads come last: they leave nothing in the caches that has to be written back during the next measurement.
    return {
        "copy": (lambda: target.copy_(half), setting.limit_bytes),
        "gemm": (lambda: torch.nn.functional.linear(left, right), 2.0 * setting.gemm_rows * 4096 * 4096),
        "read": (block.sum, setting.limit_bytes),
    }


def calls_of(case: Case, cold_bytes: int) -> tuple[list[Run], list[Run]]:
    count = max(2, min(64, cold_bytes // (case.bytes_read + case.bytes_written)))
    ours, others = zip(*(case.make() for _ in range(count)), strict=True)
    return list(ours), list(others)


def run_all(calls: list[Run]) -> Run:
    def run() -> None:
        for call in calls:
            call()

    return run


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure_case(
    case: Case, limits: dict[str, tuple[Run, float]], rounds: int, cold_bytes: int, device: str
) -> dict[str, Any]:
    calls = calls_of(case, cold_bytes)
    count = len(calls[0])
    ours, others = (replayable(run_all(list_of_calls), device) for list_of_calls in calls)
    ours(), others()
    samples: dict[str, list[float]] = {name: [] for name in ("ours", "torch", "speedup", "of_limit", *limits)}
    few_writes = case.bytes_written * 4 < case.bytes_read
    for _ in range(rounds):
        rates = {name: amount / seconds(run, device) for name, (run, amount) in limits.items()}
        mine, torchs = seconds(ours, device) / count, seconds(others, device) / count
        moved = (case.bytes_read + case.bytes_written) / rates["read" if few_writes else "copy"]
        least = max(moved, case.flops / rates["gemm"])
        for name, value in {
            **rates,
            "ours": mine,
            "torch": torchs,
            "speedup": torchs / mine,
            "of_limit": least / mine,
        }.items():
            samples[name].append(value)
    return {
        "name": case.name,
        "shape": case.shape,
        "bytes": case.bytes_read + case.bytes_written,
        "flops": case.flops,
    } | {name: summary(values) for name, values in samples.items()}


def call_cost() -> dict[str, dict[str, float]]:
    """Seconds per call on inputs so small that the kernel's own time does not count; also those of a torch addition."""
    x, weight = torch.ones(1, 16), torch.ones(16)
    one, cache = int32([0, 1]), torch.zeros(1, 1, 2, 1, 1, 8)
    qkv, cos_sin, predictor = torch.zeros(1, 24), torch.zeros(1, 8), torch.zeros(2, 16)
    q, out = torch.zeros(1, 1, 8), torch.empty_like(x)
    zero, grid = int32([0]), int32([[1, 1]])
    runs: dict[str, Run] = {
        "torch.add": lambda: torch.add(x, x),
        "torch.add, out given": lambda: torch.add(x, x, out=out),
        "rms_norm, out given": lambda: ops.rms_norm(x, weight, EPS, out=out),
        "rms_norm": lambda: ops.rms_norm(x, weight, EPS),
        "add_layer_norm": lambda: ops.add_layer_norm(x, out, weight, weight, EPS),
        "silu_mul": lambda: ops.silu_mul(x),
        "activation": lambda: ops.activation(x, "gelu"),
        "linear": lambda: ops.linear(x, predictor),
        "rope_store": lambda: ops.rope_store(qkv, zero, zero, cos_sin, cache, 0, zero.view(1, 1), one, 1, 1),
        "attention": lambda: ops.attention(q, q, q, one, causal=True, scale=1.0),
        "attention_decode": lambda: ops.attention_decode(q, cache, 0, zero.view(1, 1), one[1:], scale=1.0),
        "route": lambda: ops.route(x, zero, one, predictor),
        "pool": lambda: ops.pool(x, one, one, zero, grid, zero, grid, one),
        "last_row_scores": lambda: ops.last_row_scores(q, q, one, zero, zero, one, scale=1.0),
        "segmented_top_k": lambda: ops.segmented_top_k(x[0, :1], one, one),
        "kept_rows": lambda: ops.kept_rows(one, one, zero, one[1:], zero, one, one),
    }

    def thousand(run: Run) -> float:
        return seconds(lambda: [run() for _ in range(1000)]) / 1000

    return {name: summary([thousand(run) for _ in range(9)]) for name, run in runs.items()}


def spread(value: dict[str, float]) -> str:
    return f"±{(value['max'] - value['min']) / 2 / value['median'] * 100:.0f}%"


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'kernel':18}{'shape':24}{'us':>9}{'':>7}{'torch us':>10}{'':>7}"
        f"{'GB/s':>7}{'GFLOP/s':>9}{'x torch':>9}{'of limit':>10}"
    )
    for row in rows:
        mine, theirs = row["ours"], row["torch"]
        gigabytes, gigaflops = row["bytes"] / mine["median"] / 1e9, row["flops"] / mine["median"] / 1e9
        print(
            f"{row['name']:18}{row['shape']:24}{mine['median'] * 1e6:9.1f}{spread(mine):>7}"
            f"{theirs['median'] * 1e6:10.1f}{spread(theirs):>7}{gigabytes:7.1f}{gigaflops or float('nan'):9.0f}"
            f"{row['speedup']['median']:9.2f}{row['of_limit']['median'] * 100:9.0f}%"
        )
    print(f"geometric mean against torch: {statistics.geometric_mean(row['speedup']['median'] for row in rows):.2f}x")


def main() -> None:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype: torch.dtype = getattr(torch, options.dtype)
    on_gpu = is_cuda(options.device)
    if on_gpu and dtype == torch.float32:
        parser.error("--dtype float32: attention takes bfloat16 on a GPU")
    setting = GPU if on_gpu else CPU
    with torch.inference_mode(), torch.device(options.device):
        limits = limit_runs(setting, dtype)
        cases = all_cases(setting.shapes, dtype, with_linear=not on_gpu) + reduction_cases(setting.shapes, dtype)
        quantized = row_major_cases if on_gpu else quantized_cases
        cases += quantized(setting.shapes, dtype) + ([] if on_gpu else convolution_cases(dtype))
        cases = [c for c in cases if options.only in c.name]
        rows = [measure_case(c, limits, options.rounds, setting.cold_bytes, options.device) for c in cases]
        costs = {} if on_gpu else call_cost()
    rates = {name: statistics.median(row[name]["median"] for row in rows) for name in limits} if rows else {}
    print(f"{options.dtype}, {torch.get_num_threads()} threads, {ops.cpu_isa()}, torch {torch.__version__}")
    for name, rate in rates.items():
        print(f"{name}: {rate / 1e9:.1f} {'GFLOP/s' if name == 'gemm' else 'GB/s'}")
    if rows:
        print_table(rows)
    if costs:
        per_call = ", ".join(f"{name} {cost['median'] * 1e6:.1f}" for name, cost in costs.items())
        print(f"\nmicroseconds per call on one tiny row: {per_call}")
    if options.json:
        result = {
            "benchmark": "ops", "device": options.device, "machine": machine(options.device), "dtype": options.dtype,
            "isa": ops.cpu_isa(), "limits": rates, "kernels": rows, "call_seconds": costs,
        }  # fmt: skip
        write_json(options.json, result)


if __name__ == "__main__":
    main()
