"""Latency of one model: transformers dense, eager DPN, and dpn_rt with given routes, alternately in one run.

    python -m benchmarks.latency --shape llava-1b --routes 222 --batch 1 8 --json latency.json

Weights are random and routes are forced. Every round runs every row once; medians over the rounds, and ratios taken
round by round. Prefill runs from image embeddings and token ids to the first token of every request.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from tqdm import tqdm

from benchmarks import flops
from benchmarks.limits import GemmLimit, ReadLimit
from benchmarks.memory import peak_memory, resident_bytes
from benchmarks.report import print_table
from benchmarks.samples import Samples, paired_ratio
from benchmarks.shapes import NUM_TEXT_ROWS, SHAPES, prompt_token_ids, random_weights
from benchmarks.subjects import Eager, Request, Runtime, Subject, TransformersDense
from dpn_rt.config import DType, ModelConfig
from dpn_rt.eager import EagerDpn
from dpn_rt.engine_dir import TORCH_DTYPES, EngineDir, EngineSource, weight_spec, write_engine

SUBJECTS = ("transformers", "eager", "dpn_rt")
MIXED_ROUTES = ((2, 2, 2), (0, 1, 2), (1, 1, 1), (2, 0, 1))
DENSE = (0, 0, 0)
"""All rows kept: the 1x1 expert at every boundary."""


@dataclass
class Row:
    """One line of the table: a subject with one batch of requests."""

    subject: str
    label: str
    batch: int
    routes: tuple[tuple[int, ...], ...]
    flops: int = 0
    """Of the published computation."""
    computed_flops: int = 0
    """Of what this subject computes; its rate and its ratio to the GEMM limit count these."""
    kv_rows: int = 0
    samples: dict[str, Samples] = field(default_factory=dict)

    def add(self, **values: float | None) -> None:
        for name, value in values.items():
            if value is not None:
                self.samples.setdefault(name, Samples()).add(value)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=get_args(DType), default="bfloat16")
    parser.add_argument("--routes", nargs="*", default=["222"], metavar="ROUTE", help='one digit per boundary: "222"')
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="above 1: mixed routes")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="decode steps per round")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--cache", type=Path, default=None, help="keep the engine here for the next run")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    options = parser.parse_args(arguments)
    if not all(len(route) == 3 and set(route) <= set("012") for route in options.routes):
        parser.error(f"--routes: expected three digits from 0 to 2 each, got {' '.join(options.routes)}")
    options.routes = [tuple(int(digit) for digit in route) for route in options.routes]
    if min(options.batch) < 1 or options.repeats < 1 or options.tokens < 1:
        parser.error("--batch, --repeats and --tokens must be at least 1")
    return options


def plan(options: argparse.Namespace) -> list[Row]:
    """The lines of the table, in the order in which a round runs them."""
    rows = []
    for batch in options.batch:
        mixed = tuple(MIXED_ROUTES[i % len(MIXED_ROUTES)] for i in range(batch))
        same = [("".join(map(str, route)), (route,) * batch) for route in options.routes]
        groups = same if batch == 1 else [*same, ("mixed", mixed)]
        if "transformers" in options.subjects:
            rows.append(Row("transformers", "dense", batch, (DENSE,) * batch))
        if "eager" in options.subjects:
            chosen = groups if batch == 1 else groups[-1:]
            rows += [Row("eager", label, batch, routes) for label, routes in chosen]
        if "dpn_rt" in options.subjects:
            rows.append(Row("dpn_rt", "dense", batch, (DENSE,) * batch))
            rows += [Row("dpn_rt", label, batch, routes) for label, routes in groups]
    return rows


@contextlib.contextmanager
def engine_directory(model: ModelConfig, cache: Path | None, name: str) -> Iterator[Path]:
    """An engine with random weights; a temporary one unless `cache` names a place to keep it."""
    total = sum(spec.num_bytes for spec in weight_spec(model).values())
    with contextlib.ExitStack() as stack:
        root = cache or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dpn_rt-benchmark-")))
        path = root / name
        if not (path / "engine.json").exists():
            free = shutil.disk_usage(root if root.exists() else root.parent).free
            if free < total + (1 << 30):
                sys.exit(f"{root}: {total / 1e9:.1f} GB of weights do not fit, {free / 1e9:.1f} GB are free")
            root.mkdir(parents=True, exist_ok=True)
            with tqdm(total=total, unit="B", unit_scale=True, desc="random weights", leave=False, disable=None) as bar:
                write_engine(
                    path, model, EngineSource("0" * 64, "synthetic"), random_weights(model), progress=bar.update
                )
        yield path


def load_subjects(options: argparse.Namespace, path: Path, model: ModelConfig) -> dict[str, Subject]:
    """The models, on shared memory-mapped weights where they allow it."""
    subjects: dict[str, Subject] = {}
    weights = EngineDir.open(path, verify=False).load_weights()
    device = torch.device(options.device)
    if "transformers" in options.subjects:
        from benchmarks.dense_llava import dense_llava

        subjects["transformers"] = TransformersDense(dense_llava(model, weights).to(device))
    if "eager" in options.subjects:
        eager = EagerDpn.from_weights(model, weights.items(), copy=False).requires_grad_(False)
        subjects["eager"] = Eager(eager.to(device))
    if "dpn_rt" in options.subjects:
        from dpn_rt import LLM

        batch = max(options.batch)
        rows = batch * (NUM_TEXT_ROWS + 576 + options.tokens + 16)
        llm = LLM(
            path,
            device=options.device,
            max_num_seqs=batch,
            max_num_batched_tokens=rows,
            kv_cache_bytes=2 * rows * model.decoder.num_layers * flops.kv_row_bytes(model),
        )
        subjects["dpn_rt"] = Runtime(llm, model)
    return subjects


def make_requests(model: ModelConfig, row: Row) -> list[Request]:
    assert model.vision is not None
    dtype, side, ids = TORCH_DTYPES[model.dtype], model.vision.image_size, prompt_token_ids(model)
    generator = torch.Generator().manual_seed(1)
    requests = []
    for route in row.routes:
        pixels = torch.randn(3, side, side, generator=generator)
        embeds = torch.randn(model.vision.num_visual_tokens, model.decoder.hidden_size, generator=generator) * 0.02
        requests.append(Request(ids, pixels, embeds.to(dtype), route))
    return requests


def run_row(subject: Subject, row: Row, model: ModelConfig, steps: int) -> None:
    """Measure one row once."""
    requests = make_requests(model, row)
    gc.collect()
    with peak_memory() as memory:
        timing = subject.run(requests, steps)
    if timing.kv_rows != row.kv_rows:
        sys.exit(
            f"{row.subject} {row.label}: {timing.kv_rows} rows cached, expected {row.kv_rows}: wrong work measured"
        )
    row.add(
        vision=timing.vision,
        prefill=timing.prefill,
        time_to_first_token=timing.vision + timing.prefill,
        decode_step=timing.decode_step,
        tokens_per_second=row.batch / timing.decode_step,
        prefill_flops_per_second=row.computed_flops / timing.prefill,
        boundary=timing.boundary,
        peak_extra_bytes=memory.extra,
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the report."""
    model = SHAPES[options.shape].model(options.dtype)
    device, dtype = torch.device(options.device), TORCH_DTYPES[options.dtype]
    rows = plan(options)
    for row in rows:
        stages = [flops.stage_rows(model, route, NUM_TEXT_ROWS).rows for route in row.routes]
        row.flops = sum(flops.prefill_flops(model, stage) for stage in stages)
        computed = flops.needed_prefill_flops if row.subject == "dpn_rt" else flops.prefill_flops
        row.computed_flops = sum(computed(model, stage) for stage in stages)
        row.kv_rows = sum(flops.kv_rows(model, stage) for stage in stages)
    with engine_directory(model, options.cache, f"{options.shape}-{options.dtype}") as path:
        subjects = load_subjects(options, path, model)
        prompt_rows = flops.stage_rows(model, None, NUM_TEXT_ROWS).rows[0]
        gemm = GemmLimit(model.decoder, prompt_rows, dtype, device)
        read = ReadLimit(device)
        limits = Row("limits", "", 1, ())
        with tqdm(total=(options.repeats + 1) * len(rows), desc=options.shape, leave=False, disable=None) as bar:
            for repeat in range(-1, options.repeats):  # the first round warms up
                for row in rows if repeat % 2 else rows[::-1]:
                    bar.set_postfix_str(f"{row.subject} {row.label} x{row.batch}")
                    target = row if repeat >= 0 else dataclasses.replace(row, samples={})
                    run_row(subjects[row.subject], target, model, options.tokens)
                    bar.update()
                if repeat >= 0:
                    limits.add(gemm_flops_per_second=gemm.measure(), read_bytes_per_second=read.measure())
                else:
                    gemm.measure()
                    read.measure()
    return report(options, model, rows, limits)


def report(options: argparse.Namespace, model: ModelConfig, rows: list[Row], limits: Row) -> dict[str, Any]:
    """Everything that was measured, and what follows from it, as JSON."""
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
        "machine": machine(options.device),
        "dense_prefill_flops": dense,
        "vision_flops": flops.vision_flops(model.vision, model.decoder.hidden_size),
        "decode_weight_bytes": flops.decode_weight_bytes(model),
        "limits": {name: samples.to_json() for name, samples in limits.samples.items()},
        "rows": [],
    }
    for row in rows:
        kv_bytes = row.kv_rows * flops.kv_row_bytes(model)
        grown = row.batch * model.decoder.num_layers * flops.kv_row_bytes(model) * (options.tokens + 1) / 2
        step_bytes = flops.decode_weight_bytes(model) + kv_bytes + grown
        entry: dict[str, Any] = {
            "subject": row.subject,
            "routes": row.label,
            "batch": row.batch,
            "prefill_flops": row.flops,
            "computed_prefill_flops": row.computed_flops,
            "flops_to_dense": row.flops / (dense * row.batch),
            "kv_bytes": kv_bytes,
            **{name: samples.to_json() for name, samples in row.samples.items()},
            "ratios": ratios(row, rows, limits, step_bytes),
        }
        result["rows"].append(entry)
    return result


def ratios(row: Row, rows: list[Row], limits: Row, step_bytes: float) -> dict[str, Any]:
    """Speed against the other rows of the same batch, and against the limits; above 1 is faster than they."""
    found: dict[str, Any] = {}
    for other in rows:
        dense = other.label == "dense" and other.subject in ("transformers", "dpn_rt")
        same_route = other.subject == "eager" and other.routes == row.routes
        if other is row or other.batch != row.batch or not (dense or same_route) or row.subject == "transformers":
            continue
        if other.subject == "dpn_rt" and row.subject != "dpn_rt":
            continue
        name = f"{other.subject} {other.label}"
        found[name] = {
            quantity: paired_ratio(other.samples[quantity], row.samples[quantity]).to_json()
            for quantity in ("vision", "prefill", "time_to_first_token", "decode_step")
        }
        if other.subject == "dpn_rt":  # how much of the saved arithmetic becomes saved time
            saving = Samples([value * row.flops / other.flops for value in found[name]["prefill"]["samples"]])
            found["flop saving realised"] = {"prefill": saving.to_json()}
    fastest = limits.samples["gemm_flops_per_second"], limits.samples["read_bytes_per_second"]
    found["gemm limit"] = {"prefill": paired_ratio(row.samples["prefill_flops_per_second"], fastest[0]).to_json()}
    least = Samples([step_bytes / rate for rate in fastest[1].values])
    found["read limit"] = {"decode_step": paired_ratio(row.samples["decode_step"], least).to_json()}
    if "boundary" in row.samples:
        found["boundary share of prefill"] = paired_ratio(row.samples["boundary"], row.samples["prefill"]).to_json()
    return found


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "resident_bytes": resident_bytes(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    result = measure(options)
    print_table(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
