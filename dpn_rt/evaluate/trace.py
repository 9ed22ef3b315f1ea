"""What an answers file keeps of a request, and the pyramid of it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpn_rt.drawing import of_first_image
from dpn_rt.outputs import PrefillFlops, Pyramid, ReductionStep, RequestOutput

TIMES = "seconds"
"""The one entry that differs between two equal runs."""


def trace_of(output: RequestOutput) -> dict[str, Any]:
    """The trace of a finished request, in values that JSON has. `TIMES` comes last."""
    pyramid, completion, metrics = output.pyramid, output.outputs[0], output.metrics
    trace: dict[str, Any] = {"finish_reason": completion.finish_reason, "num_tokens": len(completion.token_ids)}
    if pyramid.reduction is None:
        trace["route"] = [None if kernel is None else f"{kernel[0]}x{kernel[1]}" for kernel in pyramid.kernels]
    else:
        trace |= {"reduction": pyramid.reduction, "kept": [_count(kept) for kept in pyramid.kept]}
    trace |= {"visual_tokens": pyramid.visual_tokens, "kv_lengths": pyramid.kv_lengths}
    if pyramid.flops is not None:
        trace |= {"flops": pyramid.flops.prefill, "dense_flops": pyramid.flops.dense_prefill}
    trace["pyramid"] = {
        "image_grid": pyramid.image_grid,
        "image_segments": pyramid.image_segments,
        "grids": pyramid.grids,
        "patches_per_token": pyramid.patches_per_token,
        "steps": [
            {"stage": step.stage, "spec": step.spec, "kept_rows": _mask(kept)}
            for step, kept in zip(pyramid.steps, pyramid.kept, strict=False)
        ],
    }
    trace[TIMES] = {
        "queue": _rounded(metrics.queue),
        "first_token": _rounded(metrics.time_to_first_token),
        "total": _rounded(metrics.latency),
    }
    return trace


def pyramid_of(trace: Mapping[str, Any]) -> Pyramid:
    """The pyramid that a trace was made of, without probabilities and experts' numbers."""
    detail = trace["pyramid"]
    kernels = [None if kernel is None else _pair(kernel.split("x")) for kernel in trace.get("route", [])]
    flops = None
    if "flops" in trace:
        computed, dense = trace["flops"], trace["dense_flops"]
        flops = PrefillFlops(computed, dense, 1 - computed / dense)
    num_boundaries = max(len(trace["visual_tokens"]) - 1, 0)
    return Pyramid(
        experts=[None] * num_boundaries,
        kernels=kernels or [None] * num_boundaries,
        probs=[None] * num_boundaries,
        visual_tokens=list(trace["visual_tokens"]),
        kv_lengths=list(trace["kv_lengths"]),
        grids=[None if grid is None else _pair(grid) for grid in detail["grids"]],
        kept=[_rows(step["kept_rows"]) for step in detail["steps"]],
        steps=[ReductionStep(step["stage"], step["spec"]) for step in detail["steps"]],
        reduction=trace.get("reduction"),
        image_grid=None if detail["image_grid"] is None else _pair(detail["image_grid"]),
        image_segments=[_pair(grid) for grid in detail["image_segments"]],
        patches_per_token=[_pair(size) for size in detail["patches_per_token"]],
        flops=flops,
    )


def _pair(values: Any) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)


def _count(kept: list[int] | list[list[int]] | None) -> int | None:
    """Rows that a boundary left of all images; None where it pooled."""
    if kept is None:
        return None
    return sum(len(rows) if isinstance(rows, list) else 1 for rows in kept)


def _mask(kept: list[int] | list[list[int]] | None) -> str | None:
    """Rows of the first image as bits of a hexadecimal number: a tenth of the digits that a list would take."""
    return None if kept is None else f"{sum(1 << row for row in of_first_image(kept)):x}"


def _rows(mask: str | None) -> list[int] | None:
    if mask is None:
        return None
    bits = int(mask, 16)
    return [row for row in range(bits.bit_length()) if bits >> row & 1]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
