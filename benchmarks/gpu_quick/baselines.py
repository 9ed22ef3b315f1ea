"""transformers (dense) and the eager DPN beside the runtime, round by round; the report is that of `latency.py`.

Each subject is loaded by itself, and each row's samples are saved when it has run. The runtime has graphs of prefill
stages up to the rows of one request, as in the step `model`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import latency
from benchmarks.comparison.measure import count_work, load_dense, load_eager, load_runtime, run_row
from benchmarks.comparison.report import print_table
from benchmarks.comparison.rows import Row, plan
from benchmarks.comparison.subjects import Subject
from benchmarks.comparison.summary import report
from benchmarks.gpu_quick.model import MAX_GRAPH_ROWS
from benchmarks.gpu_quick.record import Recorder
from benchmarks.gpu_quick.settings import Settings
from benchmarks.measuring.limits import GemmLimit, ReadLimit
from benchmarks.models.shapes import NUM_TEXT_ROWS, SHAPES, random_weights
from dpn_rt.format import flops
from dpn_rt.format.config import ModelConfig
from dpn_rt.schema.weights import TORCH_DTYPES

ROUNDS, STEPS = 2, 4
SECONDS_TO_TELL = 4
"""What was measured is still told in the step's time."""


def run(settings: Settings, record: Recorder) -> None:
    options = options_of(settings)
    model = SHAPES[options.shape].model(options.dtype)
    rounds = Rounds(options, model, load(options, model, record), record)
    for number in range(options.repeats + 1):  # the first round warms up
        if not rounds.measure(is_warm=number > 0):
            break
        if number > 0:
            record.attempt("report", lambda number=number: record.put(report=rounds.report(number)))
    record.attempt("ratios", lambda: tell(record))


def options_of(settings: Settings) -> argparse.Namespace:
    """Those of `latency.py`."""
    arguments = ["--shape", settings.shape, "--device", settings.device, "--dtype", settings.dtype]
    arguments += ["--batch", *map(str, settings.baseline_batches), "--mix", "40-40-20"]
    arguments += ["--repeats", str(min(ROUNDS, settings.rounds)), "--tokens", str(min(STEPS, settings.tokens))]
    return latency.parse_arguments([*arguments, "--subjects", "transformers", "eager", "dpn_rt"])


def load(options: argparse.Namespace, model: ModelConfig, record: Recorder) -> dict[str, Subject]:
    """The subjects that can be made here, on the same weights."""
    weights = dict(random_weights(model, device=options.device))
    makers: dict[str, Callable[[], Subject]] = {
        "dpn_rt": lambda: load_runtime(options, weights, model, max_graph_rows=MAX_GRAPH_ROWS),
        "transformers": lambda: load_dense(model, weights, options.device),
        "eager": lambda: load_eager(model, weights, options.device),
    }
    subjects: dict[str, Subject] = {}
    for name, make in makers.items():
        record.attempt(name, lambda name=name, make=make: subjects.update({name: make()}))
    return subjects


class Rounds:
    """Runs the rows of the subjects that there are, each once in a round."""

    def __init__(
        self, options: argparse.Namespace, model: ModelConfig, subjects: dict[str, Subject], record: Recorder
    ) -> None:
        self._options, self._model, self._subjects, self._record = options, model, subjects, record
        self._rows = [row for row in plan(options) if row.subject in subjects]
        count_work(model, self._rows)
        device, num_rows = torch.device(options.device), flops.stage_rows(model, None, NUM_TEXT_ROWS).rows[0]
        self._gemm = GemmLimit(model.decoder, num_rows, TORCH_DTYPES[options.dtype], device)
        self._read, self._limits = ReadLimit(device), Row("limits", "", 1, ())

    def measure(self, *, is_warm: bool) -> bool:
        """One round, whose samples count where it `is_warm`. False: the step's time is over. A row that fails is left
        out of the rounds after this one, and of the report."""
        for row in list(self._rows):
            if self._record.seconds_left < SECONDS_TO_TELL:
                return False
            name = f"{row.subject} {row.label} x{row.batch}"
            before = len(self._record.failed_parts)
            self._record.attempt(name, partial(self._run, name, row, is_warm=is_warm))
            if len(self._record.failed_parts) > before:
                self._rows.remove(row)
        gemm, read = self._gemm.measure(), self._read.measure()
        if is_warm:
            self._limits.add(gemm_flops_per_second=gemm, read_bytes_per_second=read)
        return True

    def _run(self, name: str, row: Row, *, is_warm: bool) -> None:
        target, start = row if is_warm else replace(row, samples={}), time.monotonic()
        run_row(self._subjects[row.subject], target, self._model, self._options.tokens if is_warm else 1)
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
        if is_warm:
            samples = {quantity: found.values for quantity, found in row.samples.items()}
            self._record.put(samples={**self._record.values.get("samples", {}), name: samples})

    def report(self, number: int) -> dict[str, Any]:
        """That of `latency.py` after so many rounds."""
        options = argparse.Namespace(**vars(self._options) | {"repeats": number})
        return report(options, self._model, self._rows, self._limits)


def tell(record: Recorder) -> None:
    """A line for each row: its times, and how many times faster the runtime is; times alone before the first report."""
    if "report" not in record.values:
        for name, samples in record.values.get("samples", {}).items():
            prefill, step = (statistics.median(samples[quantity]) * 1e3 for quantity in ("prefill", "decode_step"))
            record.say(f"{name}: prefill {prefill:.2f}, decode {step:.2f} ms")
        return
    found: dict[str, Any] = record.values["report"]
    print_table(found)
    for row in found["rows"]:
        prefill, step = (row[name]["median"] * 1e3 for name in ("prefill", "decode_step"))
        faster = [
            f"{ratio['prefill']['median']:.2f}x and {ratio['decode_step']['median']:.2f}x {other}"
            for other, ratio in row["ratios"].items()
            if other.startswith(("transformers", "eager")) and row["subject"] == "dpn_rt"
        ]
        name = f"{row['subject']} {row['routes']} x{row['batch']}"
        record.say(f"{name}: prefill {prefill:.2f}, decode {step:.2f} ms" + "".join(f", {each}" for each in faster))
