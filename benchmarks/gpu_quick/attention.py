"""Attention of a prefill and of a decode step: our kernels, torch's, and others where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_quick.record import Recorder
from benchmarks.gpu_quick.settings import Settings
from benchmarks.gpu_quick.timing import cold_seconds, copies_of, shown, told
from benchmarks.measuring.clock import Run
from benchmarks.models.shapes import SHAPES
from benchmarks.op_cases.cases import KernelShapes, attention_cases, torch_attention
from dpn_rt import ops
from dpn_rt.schema.weights import TORCH_DTYPES

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Queries, keys and values `[num_rows, heads, head_dim]`, and `cu_seqlens`."""
Make = Callable[[Inputs, tuple[int, ...]], Run]


def run(settings: Settings, record: Recorder) -> None:
    with torch.inference_mode(), torch.device(settings.device):
        record.attempt("prefill", lambda: prefills(settings, record))
        record.attempt("decode", lambda: decodes(settings, record))


def prefills(settings: Settings, record: Recorder) -> None:
    table = []
    for lengths in settings.prefills:
        found, flops = prefill(settings, lengths)
        table.append({"lengths": lengths, "flops": flops, "seconds": found})
        record.put(prefills=table)
        times = ", ".join(f"{name} {shown(value)}" for name, value in found.items())
        record.say(f"prefill of {len(lengths)} x {min(lengths)}-{max(lengths)} rows, us: {times}")


def prefill(settings: Settings, lengths: tuple[int, ...]) -> tuple[dict[str, float | str], int]:
    """Seconds of each subject, and FLOPs."""
    shape, dtype = SHAPES[settings.shape], TORCH_DTYPES[settings.dtype]
    head_dim = shape.hidden_size // shape.num_heads
    heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]

    def inputs() -> Inputs:
        qkv = torch.randn(sum(lengths), sum(heads), head_dim).to(dtype)
        q, k, v = torch.split(qkv, heads, dim=1)
        return q, k, v, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    size = sum(lengths) * sum(heads) * head_dim * dtype.itemsize
    given = [inputs() for _ in range(copies_of(size, settings.cold_bytes))]
    ours = ours_of(given[0], lengths)()

    def timed(make: Make) -> float:
        calls = [make(each, lengths) for each in given]
        check(calls[0](), ours)
        return cold_seconds(calls, settings.device)

    found = {name: told(partial(timed, make)) for name, make in SUBJECTS.items()}
    return found, 2 * sum(n * n for n in lengths) * shape.num_heads * head_dim


def ours_of(inputs: Inputs, lengths: tuple[int, ...]) -> Run:
    q, k, v, cu_seqlens = inputs
    return lambda: ops.attention(q, k, v, cu_seqlens, causal=True, scale=q.shape[-1] ** -0.5).view(q.shape)


def sdpa_of(inputs: Inputs, lengths: tuple[int, ...]) -> Run:
    """torch's flash kernel: sequences of equal length as one batch, others one by one."""
    is_even = len(set(lengths)) == 1
    groups = [inputs[:3]] if is_even else list(zip(*(part.split(lengths) for part in inputs[:3]), strict=True))
    batches = [[part.unflatten(0, (-1, lengths[0] if is_even else len(part))) for part in group] for group in groups]
    batches = [[part.transpose(1, 2) for part in batch] for batch in batches]

    def call() -> Tensor:
        parts = [torch_attention(*batch, causal=True) for batch in batches]
        return parts[0].transpose(1, 2).flatten(0, 1) if is_even else parts  # type: ignore[return-value]

    return call


def torch_varlen_of(inputs: Inputs, lengths: tuple[int, ...]) -> Run:
    """torch's own attention over packed sequences; torch has it since 2.10."""
    from torch.nn.attention import varlen

    varlen_attn: Any = varlen.varlen_attn  # its arguments differ between versions
    q, k, v, cu_seqlens = inputs
    ends = (cu_seqlens, cu_seqlens, max(lengths), max(lengths))
    try:
        varlen_attn(q, k, v, *ends, is_causal=True)
        return lambda: varlen_attn(q, k, v, *ends, is_causal=True)
    except TypeError:  # later versions have a window instead
        return lambda: varlen_attn(q, k, v, *ends, window_size=(-1, 0))


def flash_attn_of(inputs: Inputs, lengths: tuple[int, ...]) -> Run:
    from flash_attn import flash_attn_varlen_func

    q, k, v, cu_seqlens = inputs
    longest = max(lengths)
    return lambda: flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)


SUBJECTS: dict[str, Make] = {
    "dpn_rt": ours_of,
    "sdpa": sdpa_of,
    "varlen_attn": torch_varlen_of,
    "flash_attn": flash_attn_of,
}


def check(actual: object, ours: Tensor) -> None:
    """Refuse a subject that computes something else."""
    if isinstance(actual, Tensor):
        torch.testing.assert_close(actual.float(), ours.float(), atol=2e-2, rtol=2e-2)


def decodes(settings: Settings, record: Recorder) -> None:
    shape, dtype, table = SHAPES[settings.shape], TORCH_DTYPES[settings.dtype], []
    sizes = KernelShapes(
        shape.hidden_size, shape.intermediate_size, shape.num_heads, shape.num_kv_heads,
        shape.hidden_size // shape.num_heads, 1, settings.decodes, prefills=(), images=(),
    )  # fmt: skip
    for case in attention_cases(sizes, dtype):
        made = [case.make() for _ in range(copies_of(case.bytes_read, settings.cold_bytes))]
        found = {
            name: told(lambda index=index, made=made: cold_seconds([pair[index] for pair in made], settings.device))
            for index, name in enumerate(("dpn_rt", "sdpa"))
        }
        table.append({"shape": case.shape, "bytes": case.bytes_read, "seconds": found})
        record.put(decodes=table)
        rate = case.bytes_read / found["dpn_rt"] / 1e9 if isinstance(found["dpn_rt"], float) else float("nan")
        times = ", ".join(f"{name} {shown(value)}" for name, value in found.items())
        record.say(f"decode of {case.shape} rows, us: {times}; {rate:.0f} GB/s")
