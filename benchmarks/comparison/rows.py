"""The rows of the latency table: which subject serves which requests, and its samples."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

from benchmarks.measuring.samples import Samples
from dpn_rt.schema.dtypes import Quantize

SUBJECTS = ("transformers", "compiled", "eager", "dpn_rt", "tensorrt")
OPTIONAL_SUBJECTS = ("compiled", "tensorrt")
"""Subjects that run only on request."""
REDUCED, REDUCED_EAGER = "reduced", "reduced eager"
"""Subjects of `--reduce`: the runtime, and plain PyTorch, on a stock model."""
PEERS = ("openvino int8", "openvino int4", "llama.cpp q8_0", "llama.cpp q4_0")
"""Other engines, in an environment of their own."""
DENSE_SUBJECTS = ("transformers", "compiled", *PEERS)
"""Subjects without routes."""
MIXES = {
    "quarters": ((2, 2, 2), (0, 1, 2), (1, 1, 1), (2, 0, 1)),
    "40-40-20": ((2, 2, 2), (1, 1, 1), (2, 2, 2), (1, 1, 1), (0, 0, 0)),
}
"""Routes of a mixed batch, used in turn: four kinds, or 40 % all 2x2, 40 % all 1x2 and 20 % all 1x1."""
DENSE = (0, 0, 0)
"""All rows kept: the 1x1 expert at every boundary."""


@dataclass
class Row:
    """One row of the table: a subject with one batch of requests."""

    subject: str
    label: str
    batch: int
    routes: tuple[tuple[int, ...], ...]
    reduce: str | None = None
    """SPEC of a training-free reduction of the stock model; None: the DPN of these routes."""
    quantize: Quantize = "none"
    """Of the engine."""
    flops: int = 0
    """FLOPs of the published computation."""
    computed_flops: int = 0
    """FLOPs that this subject computes; its rate and its ratio to the GEMM limit are based on these."""
    kv_rows: int = 0
    samples: dict[str, Samples] = field(default_factory=dict)

    def add(self, **values: float | None) -> None:
        for name, value in values.items():
            if value is not None:
                self.samples.setdefault(name, Samples()).add(value)


def plan(options: argparse.Namespace) -> list[Row]:
    """The rows of the table, in the order in which a round runs them."""
    rows = []
    own: dict[str, Quantize] = {subject: "none" for subject in ("dpn_rt", "tensorrt") if subject in options.subjects}
    own |= {quantized_subject(quantize): quantize for quantize in options.quantize}
    for batch in options.batch:
        mix = MIXES[options.mix]
        mixed = tuple(mix[i % len(mix)] for i in range(batch))
        same = [("".join(map(str, route)), (route,) * batch) for route in options.routes]
        groups = same if batch == 1 else [*same, ("mixed", mixed)]
        dense = [subject for subject in DENSE_SUBJECTS if subject in options.subjects]
        if options.peers is not None:
            dense += [subject for subject in PEERS if batch == 1 or not subject.startswith("llama.cpp")]
        rows += [Row(subject, "dense", batch, (DENSE,) * batch) for subject in dense]
        if "eager" in options.subjects and (options.eager_batch is None or batch <= options.eager_batch):
            chosen = groups if batch == 1 else groups[-1:]
            rows += [Row("eager", label, batch, routes) for label, routes in chosen]
        for subject, quantize in own.items():
            for label, routes in (("dense", (DENSE,) * batch), *groups):
                rows.append(Row(subject, label, batch, routes, quantize=quantize))
    return rows + reduced_rows(options)


def quantized_subject(quantize: Quantize) -> str:
    """The runtime on a quantised engine."""
    return f"dpn_rt {quantize}"


def reduced_rows(options: argparse.Namespace) -> list[Row]:
    """The rows of training-free reductions, beside the same model without any."""
    if not options.reduce:
        return []
    specs = ["none", *options.reduce]
    rows = [
        Row(REDUCED, spec.replace("none", "dense"), batch, (DENSE,) * batch, spec)
        for batch in options.batch
        for spec in specs
    ]
    if 1 in options.batch and "eager" in options.subjects:
        rows += [Row(REDUCED_EAGER, spec.replace("none", "dense"), 1, (DENSE,), spec) for spec in specs]
    return rows
