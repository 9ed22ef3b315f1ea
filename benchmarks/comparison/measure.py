"""Runs the latency benchmark: every subject on one engine with random weights, round by round."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.comparison.rows import (
    DENSE,
    DENSE_SUBJECTS,
    PEERS,
    REDUCED,
    REDUCED_EAGER,
    Row,
    plan,
    quantized_subject,
)
from benchmarks.comparison.subjects import Eager, EagerReducing, Request, Runtime, Subject, TransformersDense
from benchmarks.comparison.summary import report
from benchmarks.measuring.clock import is_cuda
from benchmarks.measuring.limits import GemmLimit, ReadLimit
from benchmarks.measuring.memory import peak_memory
from benchmarks.models.dense_llava import dense_llava
from benchmarks.models.plan_engine import write_plan_engine
from benchmarks.models.shapes import NUM_TEXT_ROWS, SHAPES, RandomWeights, prompt_token_ids, random_weights
from benchmarks.peers.models import load_peer
from benchmarks.peers.remote import Remote
from dpn_rt.builders.quantize import stored_tensors
from dpn_rt.errors import DpnError
from dpn_rt.format import flops
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineDir, EngineSource, weight_spec, write_engine
from dpn_rt.format.weight_spec import canonical_specs
from dpn_rt.model.reduction.before_llm import segments_before_llm
from dpn_rt.model.reduction.chain import Chain
from dpn_rt.model.reduction.grid import Segments, num_visual
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.model.reduction.spec import parse_spec
from dpn_rt.reference import EagerDpn
from dpn_rt.schema.dtypes import Quantize
from dpn_rt.schema.weights import TORCH_DTYPES
from dpn_rt.settings import EngineOptions


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all rows in all rounds and return the report."""
    model = SHAPES[options.shape].model(options.dtype)
    device, dtype = torch.device(options.device), TORCH_DTYPES[options.dtype]
    rows = plan(options)
    count_work(model, rows)
    copies = bool(options.subjects) + ("tensorrt" in options.subjects) + bool(options.reduce)
    forms: list[Quantize] = ["none"] * copies + options.quantize
    name = f"{options.shape}-{options.dtype}"
    in_memory = is_in_memory(options)
    place = contextlib.nullcontext() if in_memory else engine_directory(model, options.cache, name, forms)
    with place as path:
        subjects = load_subjects(options, path, model)
        if options.reduce:
            subjects |= load_reduced(options, path, model)
        for quantize in options.quantize:
            subjects[quantized_subject(quantize)] = load_quantized(options, path, model, quantize)
        if options.peers is not None:
            subjects |= {subject: load_peer(subject, options.peers, path, model) for subject in PEERS}
        if "compiled" in subjects and (problem := compile_problem(subjects["compiled"], model)):
            print(f"no rows of torch.compile, which does not work here: {problem}", file=sys.stderr)
            del subjects["compiled"]
        rows = [row for row in rows if row.subject in subjects]
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
        result = report(options, model, rows, limits)
        result["peers"] = {name: each.settings for name, each in subjects.items() if isinstance(each, Remote)}
        return result


def count_work(model: ModelConfig, rows: Iterable[Row]) -> None:
    """Set the FLOPs and the cached rows of each row."""
    for row in rows:
        shaped, stages = model, [flops.stage_rows(model, route, NUM_TEXT_ROWS).rows for route in row.routes]
        if row.reduce is not None:
            shaped, rows_per_stage = reduced_stages(model, row.reduce)
            stages = [rows_per_stage] * row.batch
        row.flops = sum(flops.prefill_flops(shaped, stage) for stage in stages)
        is_own = row.subject.startswith("dpn_rt") or row.subject == REDUCED
        computed = flops.needed_prefill_flops if is_own else flops.prefill_flops
        row.computed_flops = sum(computed(shaped, stage) for stage in stages)
        row.kv_rows = sum(flops.kv_rows(shaped, stage) for stage in stages)


@contextlib.contextmanager
def engine_directory(
    model: ModelConfig, cache: Path | None, name: str, forms: Sequence[Quantize] = ("none",)
) -> Iterator[Path]:
    """Where engines with random weights are, in `cache` if given, else in a temporary directory.

    `forms` are those in which the weights will be written, a form as often as there are copies. There must be disk
    space for all of them. Here only the engine that is not quantised is written, if it is among them.
    """
    specs = [weight_spec(dataclasses.replace(model, quantize=form)) for form in forms]
    needed = sum(spec.num_bytes for each in specs for spec in each.values())
    with contextlib.ExitStack() as stack:
        root = cache or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dpn_rt-benchmark-")))
        root.mkdir(parents=True, exist_ok=True)
        path = root / name
        if "none" in forms and not (path / "engine.json").exists():
            free = shutil.disk_usage(root).free
            if free < needed + (1 << 30):
                sys.exit(f"{root}: {needed / 1e9:.1f} GB of weights do not fit, {free / 1e9:.1f} GB are free")
            write(path, model, random_weights(model))
        yield path


def write(path: Path, model: ModelConfig, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """An engine of `tensors`."""
    total = sum(spec.num_bytes for spec in weight_spec(model).values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=path.name, leave=False, disable=None) as bar:
        write_engine(path, model, EngineSource("0" * 64, "synthetic"), tensors, progress=bar.update)


def visual_rows(model: ModelConfig) -> int:
    """Of one image."""
    assert model.vision is not None
    return model.vision.num_visual_tokens


def is_in_memory(options: argparse.Namespace) -> bool:
    """Whether the weights are made on the GPU and stay there: plans alone are files, and a cache is asked for."""
    return is_cuda(options.device) and "tensorrt" not in options.subjects and options.cache is None


def load_subjects(options: argparse.Namespace, path: Path | None, model: ModelConfig) -> dict[str, Subject]:
    """The subjects by name. They share the weights where they can.

    `path`: of an engine, whose file is mapped; None: the weights are made on the device.
    """
    subjects: dict[str, Subject] = {}
    if not options.subjects:
        return subjects
    weights = weights_of(options, path, model)
    if set(DENSE_SUBJECTS) & set(options.subjects):
        dense = load_dense(model, weights, options.device)
        subjects["transformers"] = dense
        if "compiled" in options.subjects:
            subjects["compiled"] = TransformersDense(dense.model, compiled=True)
    if "eager" in options.subjects:
        subjects["eager"] = load_eager(model, weights, options.device)
    batch = max(options.batch)
    rows = NUM_TEXT_ROWS + visual_rows(model) + options.tokens + 16
    if "dpn_rt" in options.subjects:
        subjects["dpn_rt"] = load_runtime(options, path or weights, model)
    if "tensorrt" in options.subjects:
        from dpn_rt import LLM

        assert path is not None, "plans are files"
        try:
            with_plans = write_plan_engine(path, path.with_name(f"{path.name}-plans"), model, batch, rows)
            llm = LLM(with_plans, max_num_batched_tokens=batch * rows)
            subjects["tensorrt"] = Runtime(llm, model, options.device)
        except DpnError as error:
            print(f"no rows of TensorRT plans, which do not work here: {error}", file=sys.stderr)
    return subjects


def load_dense(model: ModelConfig, weights: Mapping[str, torch.Tensor], device: str) -> TransformersDense:
    """transformers' model of the same sizes, without the DPN's boundaries."""
    return TransformersDense(dense_llava(model, weights).to(device))


def load_eager(model: ModelConfig, weights: Mapping[str, torch.Tensor], device: str) -> Eager:
    """The eager DPN on these weights, which are not copied where they are on the device."""
    eager = EagerDpn.from_weights(model, weights.items(), copy=False).requires_grad_(False)
    return Eager(eager.to(device))


def weights_of(options: argparse.Namespace, path: Path | None, model: ModelConfig) -> Mapping[str, torch.Tensor]:
    """Of an engine's mapped file, or made on the device where there is none."""
    if path is None:
        return dict(random_weights(model, device=options.device))
    return EngineDir.open(path, verify=False).load_weights()


def load_quantized(options: argparse.Namespace, path: Path, model: ModelConfig, quantize: Quantize) -> Subject:
    """The runtime on an engine with the same weights, quantised."""
    quantized = dataclasses.replace(model, quantize=quantize)
    target = path.with_name(f"{path.name}-{quantize}")
    if not (target / "engine.json").exists():
        specs = weight_spec(quantized)
        write(target, quantized, stored_tensors(specs, canonical_specs(model), quantize, RandomWeights(model)))
    return load_runtime(options, target, quantized)


def load_runtime(
    options: argparse.Namespace, source: Path | Mapping[str, torch.Tensor], model: ModelConfig, **more: Any
) -> Runtime:
    """The runtime with room for the largest batch, on an engine or on weights in memory."""
    from dpn_rt import LLM

    batch = max(options.batch)
    rows = NUM_TEXT_ROWS + visual_rows(model) + options.tokens + 16
    limits: dict[str, Any] = {
        "max_num_seqs": batch,
        "max_num_batched_tokens": batch * rows,
        "kv_cache_bytes": 2 * batch * rows * model.decoder.num_layers * flops.kv_row_bytes(model),
        **more,
    }
    if isinstance(source, Path):
        llm = LLM(source, device=options.device, **limits)
    else:
        llm = LLM.from_weights(model, source.items(), options.device, EngineOptions(**limits))
    return Runtime(llm, llm.model, options.device)


def reduced_stages(model: ModelConfig, spec: str, num_text: int = NUM_TEXT_ROWS) -> tuple[ModelConfig, tuple[int, ...]]:
    """The stock model with one reduction's stages, and the rows of one request in each."""
    chain = parse_spec(spec, model.decoder.num_layers)
    assert model.vision is not None
    segments: Segments = (model.vision.grid,)
    if chain.before_llm is not None:
        segments = segments_before_llm(chain.before_llm, segments)
    asked = StageRequest(None, chain, (segments,), None)
    rows = chain.most_rows(num_text + num_visual(segments), asked.segments, chain.choices(asked, None))
    return dataclasses.replace(model, reduction=chain), rows


@dataclasses.dataclass(frozen=True)
class StageRequest:
    """`Asked`: a request with one image."""

    route: None
    reduction: Chain
    segments: tuple[Segments, ...]
    kept: None


def load_reduced(options: argparse.Namespace, path: Path | None, model: ModelConfig) -> dict[str, Subject]:
    """The subjects of `--reduce`, on a stock model with the same decoder and encoder."""
    stock = dataclasses.replace(model, reduction=NoReduction())
    dense_path = None if path is None else path.with_name(f"{path.name}-stock")
    if dense_path is not None and not (dense_path / "engine.json").exists():
        write(dense_path, stock, random_weights(stock))
    weights = weights_of(options, dense_path, stock)
    runtime = load_runtime(options, dense_path or weights, stock, reduce=["none", *options.reduce])
    subjects: dict[str, Subject] = {REDUCED: runtime}
    if "eager" in options.subjects:
        eager = EagerDpn.from_weights(stock, weights.items(), copy=False).requires_grad_(False)
        subjects[REDUCED_EAGER] = EagerReducing(eager.to(options.device))
    return subjects


def compile_problem(subject: Subject, model: ModelConfig) -> str | None:
    """The error of one small round under torch.compile; None where it works."""
    try:
        subject.run(make_requests(model, Row("compiled", "dense", 1, (DENSE,))), 1)
    except Exception as error:  # the compiler raises many kinds
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def make_requests(model: ModelConfig, row: Row) -> list[Request]:
    assert model.vision is not None
    dtype, side, ids = TORCH_DTYPES[model.dtype], model.vision.image_size, prompt_token_ids(model)
    generator = torch.Generator().manual_seed(1)
    requests = []
    for route in row.routes:
        pixels = torch.randn(3, side, side, generator=generator)
        embeds = torch.randn(model.vision.num_visual_tokens, model.decoder.hidden_size, generator=generator) * 0.02
        requests.append(Request(ids, pixels, embeds.to(dtype), None if row.reduce else route, row.reduce))
    return requests


class WrongWorkError(Exception):
    """A subject has computed something else than its row says."""


def run_row(subject: Subject, row: Row, model: ModelConfig, steps: int) -> None:
    """Measure one row in one round.

    Raises:
        WrongWorkError: another number of rows is cached than the row's requests have.
    """
    requests = make_requests(model, row)
    gc.collect()
    with peak_memory() as memory:
        timing = subject.run(requests, steps)
    if timing.kv_rows != row.kv_rows:
        raise WrongWorkError(
            f"{row.subject} {row.label}: {timing.kv_rows} rows cached, expected {row.kv_rows}: wrong work measured"
        )
    row.add(
        vision=timing.vision,
        prefill=timing.prefill,
        time_to_first_token=None if timing.vision is None else timing.vision + timing.prefill,
        decode_step=timing.decode_step,
        tokens_per_second=row.batch / timing.decode_step,
        prefill_flops_per_second=row.computed_flops / timing.prefill,
        boundary=timing.boundary,
        between_stages=timing.between_stages,
        peak_extra_bytes=memory.extra,
    )
