"""Outputs as a table of pandas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpn_rt.evaluate.optional import need
from dpn_rt.outputs import RequestOutput


def to_dataframe(outputs: Sequence[RequestOutput | None]) -> Any:
    """A `pandas.DataFrame` with one row an output, as `rows_of` makes it.

    Raises:
        EvaluationError: pandas is not installed.
    """
    return need("pandas", "to_dataframe").DataFrame(rows_of(outputs))


def rows_of(outputs: Sequence[RequestOutput | None]) -> list[dict[str, Any]]:
    """One row an output: what was answered, what was left of the image, FLOPs, and seconds. Failed ones are None."""
    return [{"text": None} if output is None else _row(output) for output in outputs]


def _row(output: RequestOutput) -> dict[str, Any]:
    pyramid, metrics = output.pyramid, output.metrics
    completion = output.outputs[0] if output.outputs else None
    kernels = ["skipped" if kernel is None else f"{kernel[0]}x{kernel[1]}" for kernel in pyramid.kernels]
    return {
        "text": None if completion is None else completion.text.strip(),
        "finish_reason": None if completion is None else completion.finish_reason,
        "num_tokens": None if completion is None else len(completion.token_ids),
        "reduction": pyramid.reduction,
        "route": " ".join(kernels) if pyramid.reduction is None else None,
        "visual_tokens": list(pyramid.visual_tokens),
        "visual_tokens_last": pyramid.visual_tokens[-1] if pyramid.visual_tokens else None,
        "flops": None if pyramid.flops is None else pyramid.flops.prefill,
        "flops_saved": None if pyramid.flops is None else pyramid.flops.saved,
        "first_token_seconds": metrics.time_to_first_token,
        "total_seconds": metrics.latency,
        "error": None if output.error is None else str(output.error),
    }
