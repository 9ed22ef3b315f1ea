"""The latency report as JSON: medians, spreads, ratios to the baselines and to the limits of the machine."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any, get_args

from benchmarks.comparison.rows import DENSE_SUBJECTS, REDUCED, REDUCED_EAGER, Row, quantized_subject
from benchmarks.measuring.machine import machine
from benchmarks.measuring.samples import Samples, paired_ratio
from benchmarks.models.shapes import NUM_TEXT_ROWS
from dpn_rt.format import flops
from dpn_rt.format.config import ModelConfig
from dpn_rt.schema.dtypes import Quantize


def report(options: argparse.Namespace, model: ModelConfig, rows: list[Row], limits: Row) -> dict[str, Any]:
    """All samples, and what follows from them, as JSON."""
    dense = flops.prefill_flops(model, flops.stage_rows(model, None, NUM_TEXT_ROWS).rows)
    assert model.vision is not None
    result: dict[str, Any] = {
        "benchmark": "latency",
        "shape": options.shape,
        "dtype": options.dtype,
        "device": options.device,
        "prompt": {"text_rows": NUM_TEXT_ROWS, "visual_rows": model.vision.num_visual_tokens},
        "decode_steps": options.tokens,
        "rounds": options.repeats,
        "mix": options.mix,
        "machine": machine(options.device),
        "dense_prefill_flops": dense,
        "vision_flops": flops.vision_flops(model),
        "decode_weight_bytes": flops.decode_weight_bytes(model),
        "limits": {name: samples.to_json() for name, samples in limits.samples.items()},
        "rows": [],
    }
    for row in rows:
        kv_bytes = row.kv_rows * flops.kv_row_bytes(model)
        grown = row.batch * model.decoder.num_layers * flops.kv_row_bytes(model) * (options.tokens + 1) / 2
        step_bytes = flops.decode_weight_bytes(replace(model, quantize=row.quantize)) + kv_bytes + grown
        entry: dict[str, Any] = {
            "subject": row.subject,
            "routes": row.label,
            "batch": row.batch,
            "prefill_flops": row.flops,
            "computed_prefill_flops": row.computed_flops,
            "flops_to_dense": row.flops / (dense * row.batch),
            "kv_bytes": kv_bytes,
            **{name: samples.to_json() for name, samples in row.samples.items()},
            "ratios": ratios(model, row, rows, limits, step_bytes),
        }
        result["rows"].append(entry)
    return result


SAME_ROUTE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(DENSE_SUBJECTS, ()),
    "eager": (),
    "dpn_rt": ("eager",),
    "tensorrt": ("eager", "dpn_rt"),
    **{quantized_subject(quantize): ("eager", "dpn_rt") for quantize in get_args(Quantize)},
    REDUCED: (),
    REDUCED_EAGER: (),
}
"""Subject -> the subjects that it is compared with on the same routes."""


def ratios(model: ModelConfig, row: Row, rows: list[Row], limits: Row, step_bytes: float) -> dict[str, Any]:
    """Speed relative to the other rows of the same batch and to the limits; above 1 is faster."""
    found: dict[str, Any] = {}
    for other in rows:
        dense = other.label == "dense" and other.subject in (*DENSE_SUBJECTS, "dpn_rt", row.subject)
        same_route = other.routes == row.routes and other.subject in SAME_ROUTE[row.subject]
        if row.reduce is not None or other.reduce is not None:  # beside the stock model, not beside the DPN
            dense = other.label == "dense" and other.subject == row.subject
            same_route = row.subject == REDUCED and other.subject == REDUCED_EAGER and other.reduce == row.reduce
        if other is row or other.batch != row.batch or not (dense or same_route) or row.subject in DENSE_SUBJECTS:
            continue
        if other.subject == "dpn_rt" and row.subject == "eager":
            continue
        name = f"{other.subject} {other.label}"
        found[name] = {
            quantity: paired_ratio(other.samples[quantity], row.samples[quantity]).to_json()
            for quantity in ("vision", "prefill", "time_to_first_token", "decode_step")
            if quantity in other.samples
        }
        if other.subject == row.subject:  # the share of saved FLOPs that becomes saved time
            saving = Samples([value * row.flops / other.flops for value in found[name]["prefill"]["samples"]])
            vision = flops.vision_flops(model) * row.batch
            whole = [
                value * (row.flops + vision) / (other.flops + vision)
                for value in found[name]["time_to_first_token"]["samples"]
            ]
            found["flop saving realised"] = {
                "prefill": saving.to_json(),
                "time_to_first_token": Samples(whole).to_json(),
            }
    fastest = limits.samples["gemm_flops_per_second"], limits.samples["read_bytes_per_second"]
    found["gemm limit"] = {"prefill": paired_ratio(row.samples["prefill_flops_per_second"], fastest[0]).to_json()}
    least = Samples([step_bytes / rate for rate in fastest[1].values])
    found["read limit"] = {"decode_step": paired_ratio(row.samples["decode_step"], least).to_json()}
    for quantity in ("boundary", "between_stages"):
        if quantity in row.samples:
            name = f"{quantity.replace('_', ' ')} share of prefill"
            found[name] = paired_ratio(row.samples[quantity], row.samples["prefill"]).to_json()
    return found
