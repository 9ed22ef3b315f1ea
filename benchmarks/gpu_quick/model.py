"""A model of published size: first tokens beside transformers and the eager model, times, and its longest kernels."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.comparison.measure import load_dense, load_eager, load_runtime, make_requests
from benchmarks.comparison.rows import DENSE, MIXES, Row
from benchmarks.comparison.subjects import Eager, Request, Runtime, Timing, TransformersDense
from benchmarks.gpu_quick.record import Recorder
from benchmarks.gpu_quick.settings import Settings
from benchmarks.measuring.clock import is_cuda, synchronize
from benchmarks.models.shapes import SHAPES, random_weights
from dpn_rt import SamplingParams
from dpn_rt.backends.kernels.stage_graphs import StageGraphs
from dpn_rt.format.config import ModelConfig

ROUTE = (2, 2, 2)
MAX_GRAPH_ROWS = 704
"""The prompt of a request has 636 rows. Graphs of more rows would take seconds to record, and no time here has them."""
PROFILED_STEPS = 4
SHOWN_KERNELS = 12


def run(settings: Settings, record: Recorder) -> None:
    model = SHAPES[settings.shape].model(settings.dtype)
    weights = dict(random_weights(model, device=settings.device))
    options = argparse.Namespace(batch=settings.batches, tokens=settings.tokens, device=settings.device)
    start = time.perf_counter()
    runtime = load_runtime(options, weights, model, max_graph_rows=MAX_GRAPH_ROWS)
    synchronize(settings.device)
    record.attempt("load", lambda: tell_load(runtime, time.perf_counter() - start, settings.device, record))
    (routed,) = make_requests(model, Row("dpn_rt", "", 1, (ROUTE,)))
    whole = Request(routed.token_ids, routed.pixels, routed.image_embeds, None, "none")
    for name, load, request in (("transformers", load_dense, whole), ("eager", load_eager, routed)):
        compare = partial(first_logits, name, partial(load, model, weights, settings.device), request, runtime, record)
        record.attempt(f"first_logits_{name}", compare)
    record.attempt("times", lambda: times(model, runtime, settings, record))
    record.attempt("kernels", lambda: longest_kernels(model, runtime, settings.device, record))


def tell_load(runtime: Runtime, seconds: float, device: str, record: Recorder) -> None:
    """How long it took to load the runtime and to record its graphs, and what memory is taken."""
    stages = runtime.llm.engine.runner.backend.stages
    graphs = len(stages._graphs) if isinstance(stages, StageGraphs) else 0
    free, total = torch.cuda.mem_get_info() if is_cuda(device) else (0, 0)
    taken, of_torch = total - free, torch.cuda.memory_reserved() if is_cuda(device) else 0
    record.put(load={"seconds": seconds, "stage_graphs": graphs, "taken_bytes": taken, "torch_bytes": of_torch})
    record.say(
        f"loaded in {seconds:.1f} s with {graphs} graphs of stages; {taken / 1e9:.1f} GB are taken, "
        f"{of_torch / 1e9:.1f} of them by torch, the rest by the driver and its graphs"
    )


def first_logits(
    name: str,
    load: Callable[[], TransformersDense | Eager],
    request: Request,
    runtime: Runtime,
    record: Recorder,
) -> None:
    """The log-probabilities of the first token beside those of a reference, which is loaded here."""
    expected = load().first_logits(request).float().cpu().log_softmax(-1)
    found = difference(runtime.first_logprobs(request), expected)
    record.put(**{f"first_logits_{name}": found})
    record.say(
        f"first token beside {name}: root mean square of differences {found['relative']:.2e} of the logits' "
        f"spread, largest {found['largest']:.3f}, best token {'the same' if found['same_best'] else 'ANOTHER'}"
    )


def difference(actual: torch.Tensor, expected: torch.Tensor) -> dict[str, Any]:
    """Between two `[vocab_size]` of log-probabilities."""
    error = actual - expected
    return {
        "relative": float(error.square().mean().sqrt() / expected.std()),
        "largest": float(error.abs().max()),
        "same_best": bool(actual.argmax() == expected.argmax()),
        "finite": bool(actual.isfinite().all()),
    }


def times(model: ModelConfig, runtime: Runtime, settings: Settings, record: Recorder) -> None:
    """Medians: by the host vision, prefill and a decode step; by the device's events stages and boundaries."""
    mix = MIXES["40-40-20"]
    for batch in settings.batches:
        mixed = ("mixed", tuple(mix[i % len(mix)] for i in range(batch)))
        groups = [("222", (ROUTE,) * batch), ("111", (DENSE,) * batch)] if batch == 1 else [mixed]
        for label, routes in groups:
            requests = make_requests(model, Row("dpn_rt", label, batch, routes))
            name = f"{'1x1' if label == '111' else label} x{batch}"
            times_of(name, requests, runtime, settings, record)
            stages = runtime.llm.engine.runner.backend.stages
            if label == "222" and isinstance(stages, StageGraphs):
                with mock.patch.object(stages, "_graphs", {}):  # prefills go kernel by kernel
                    times_of(f"{name} without graphs of stages", requests, runtime, settings, record)


def times_of(name: str, requests: Sequence[Request], runtime: Runtime, settings: Settings, record: Recorder) -> None:
    runtime.run(requests, 1)  # warms up
    found = medians([runtime.run(requests, settings.tokens) for _ in range(settings.rounds)])
    record.put(times={**record.values.get("times", {}), name: found})
    stages = " ".join(f"{value * 1e3:.2f}" for value in found["stages"])
    record.say(
        f"{name}: vision {found['vision'] * 1e3:.2f}, prefill {found['prefill'] * 1e3:.2f} (stages {stages}, "
        f"boundaries {found['boundary'] * 1e3:.3f}, between stages {found['between_stages'] * 1e3:.3f}), "
        f"decode {found['decode_step'] * 1e3:.3f} ms"
    )


def medians(rounds: list[Timing]) -> dict[str, Any]:
    """Of each time; `stages` has one for each stage."""
    found: dict[str, Any] = {
        name: statistics.median(getattr(each, name) for each in rounds)
        for name in ("vision", "prefill", "decode_step", "boundary", "between_stages")
    }
    stages = zip(*(each.stages for each in rounds), strict=True)
    return {**found, "stages": [statistics.median(values) for values in stages]}


def longest_kernels(model: ModelConfig, runtime: Runtime, device: str, record: Recorder) -> None:
    """What takes the time of one prefill and of one decode step, and how many launches they are."""
    engine = runtime.llm.engine
    params = SamplingParams(temperature=0.0, max_tokens=2 * PROFILED_STEPS + 4, ignore_eos=True)
    (request,) = make_requests(model, Row("dpn_rt", "", 1, (ROUTE,)))
    for number, name in enumerate(("warm-up", "prefill")):
        engine.add_request(f"profiled-{number}", runtime.prompt(request), params)
        rows = profiled(engine.step, device)
        if name == "prefill":
            tell(name, rows, 1, record)
            engine.step()
            tell(
                "decode",
                profiled(lambda: [engine.step() for _ in range(PROFILED_STEPS)], device),
                PROFILED_STEPS,
                record,
            )
        while engine.num_unfinished:
            engine.step()


def profiled(work: Callable[[], object], device: str) -> list[tuple[str, int, float]]:
    """(name, calls, seconds) of the device's kernels while `work` ran, longest first; of torch's ops on the CPU."""
    on_gpu = is_cuda(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    synchronize(device)
    with profile(activities=activities) as found:
        work()
        synchronize(device)
    kind = "CUDA" if on_gpu else "CPU"
    events = [event for event in found.key_averages() if event.device_type.name == kind]
    times = [(e.key, e.count, (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e6) for e in events]
    return sorted(times, key=lambda row: -row[2])


def tell(name: str, rows: list[tuple[str, int, float]], steps: int, record: Recorder) -> None:
    if not rows:
        raise RuntimeError(f"the profiler saw no kernel of {name}")
    total, calls = sum(row[2] for row in rows), sum(row[1] for row in rows)
    record.put(**{f"{name}_kernels": [{"name": key, "calls": n / steps, "seconds": s / steps} for key, n, s in rows]})
    record.say(f"{name}: {calls / steps:.0f} launches, {total / steps * 1e3:.3f} ms in kernels")
    for key, count, spent in rows[:SHOWN_KERNELS]:
        record.say(f"  {spent / total * 100:4.1f}% {spent / steps * 1e6:9.1f} us {count / steps:6.1f}x {key[:90]}")
