"""Times the kernels that can do the same work, alternating, on shapes of a model with about a billion parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt import ops

if TYPE_CHECKING:
    from dpn_rt.tuning.cpu_choices import CpuChoices

ROUNDS = 5
MARGIN = 0.9
"""Another choice than the default must take at most this share of its time: noise must not decide."""
ROWS = (4, 8, 16, 32, 64)
"""Numbers of rows with which products are compared."""
WEIGHT_SHAPE = (2816, 2048)
NUM_WEIGHTS = 6
"""Of 11 MiB: together larger than most last caches."""

Work = Callable[[], object]


def measured_choices(default: CpuChoices, candidates: Mapping[str, Sequence[str]]) -> CpuChoices:
    """The fastest kernels for bfloat16 on this machine now.

    Args:
        default: what is chosen unless something else is clearly faster.
        candidates: op -> instruction sets, the default one first.
    """
    weights = [torch.ones(WEIGHT_SHAPE, dtype=torch.bfloat16, device="cpu") for _ in range(NUM_WEIGHTS)]
    works: dict[str, Work] = {
        "attention": _attention(),
        "attention_decode": _attention_decode(heads=8),
        "attention_decode_grouped": _attention_decode(heads=32),
        "linear": lambda: _few_rows(weights, 8),
    }
    chosen = {op: _fastest_isa(op, isas, works[op]) for op, isas in candidates.items()}
    return replace(default, **chosen, most_streamed_rows=_most_streamed_rows(weights, default.most_streamed_rows))


def _fastest_isa(op: str, isas: Sequence[str], work: Work) -> str:
    """Also what the op uses afterwards."""
    chosen = isas[0]
    if len(isas) > 1:

        def on(isa: str) -> Work:
            def run() -> object:
                ops.tune_cpu_isa(op, isa)
                return work()

            return run

        seconds = least_seconds([on(isa) for isa in isas])
        best = min(range(len(isas)), key=seconds.__getitem__)
        chosen = isas[best] if seconds[best] < MARGIN * seconds[0] else isas[0]
    ops.tune_cpu_isa(op, chosen)
    return chosen


def _most_streamed_rows(weights: list[Tensor], default: int) -> int:
    """The largest of `ROWS` up to which our kernel is not slower than torch's; 0: it always is."""
    most = 0
    for rows in ROWS:
        ours, torchs = least_seconds([lambda: _few_rows(weights, rows), lambda: _torch_rows(weights, rows)])  # noqa: B023
        if ours * (MARGIN if rows <= default else 1 / MARGIN) > torchs:
            return most
        most = rows
    return most


def least_seconds(works: Sequence[Work]) -> list[float]:
    """Of each, run in turns after one run that is not counted. The least is what other processes disturb least."""
    for work in works:
        work()
    times = [[_seconds(work) for work in works] for _ in range(ROUNDS)]
    return [min(column) for column in zip(*times, strict=True)]


def _seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _few_rows(weights: list[Tensor], rows: int) -> None:
    x = torch.ones(rows, WEIGHT_SHAPE[1], dtype=torch.bfloat16, device="cpu")
    for weight in weights:
        ops.linear(x, weight)


def _torch_rows(weights: list[Tensor], rows: int) -> None:
    x = torch.ones(rows, WEIGHT_SHAPE[1], dtype=torch.bfloat16, device="cpu")
    for weight in weights:
        functional.linear(x, weight)


def _attention() -> Work:
    rows, heads, kv_heads, head_dim = 384, 8, 2, 64
    q, k, v = (
        torch.ones(rows, count, head_dim, dtype=torch.bfloat16, device="cpu") for count in (heads, kv_heads, kv_heads)
    )
    offsets = torch.tensor([0, rows], dtype=torch.int32, device="cpu")
    return lambda: ops.attention(q, k, v, offsets, causal=True, scale=head_dim**-0.5)


def _attention_decode(heads: int) -> Work:
    """Of 8 key/value heads."""
    sequences, keys, kv_heads, head_dim, block_size = 4, 1024, 8, 64, 16
    blocks = keys // block_size
    cache = torch.ones(sequences * blocks, 1, 2, kv_heads, block_size, head_dim, dtype=torch.bfloat16, device="cpu")
    table = torch.arange(sequences * blocks, dtype=torch.int32, device="cpu").view(sequences, blocks)
    lengths = torch.full((sequences,), keys, dtype=torch.int32, device="cpu")
    q = torch.ones(sequences, heads, head_dim, dtype=torch.bfloat16, device="cpu")
    return lambda: ops.attention_decode(q, cache, 0, table, lengths, scale=head_dim**-0.5)
