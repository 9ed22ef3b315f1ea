"""Latency of one model: transformers dense, eager DPN, and dpn_rt with given routes, alternately in one run.

    python benchmarks/latency.py --shape llava-1b --routes 222 --batch 1 8 --json latency.json

Weights are random and routes are forced. Every round runs every row once. Times are medians over the rounds, and ratios
are taken round by round. Prefill starts from checked prompts, whose image embeddings are on the device, and ends with
the first token of every request. The host times the rows and waits for the device, as a user does; on a GPU events time
the limits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

if not __package__:  # run as a file: `benchmarks` is found in the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.comparison.measure import WrongWorkError, measure
from benchmarks.comparison.report import print_table
from benchmarks.comparison.rows import DENSE_SUBJECTS, MIXES, OPTIONAL_SUBJECTS, SUBJECTS
from benchmarks.measuring.result_file import write_json
from benchmarks.models.shapes import SHAPES
from dpn_rt.model.vision.hr.config import HrConfig
from dpn_rt.schema.dtypes import DType
from dpn_rt.terminal import escape_output


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=get_args(DType), default="bfloat16")
    parser.add_argument("--routes", nargs="*", default=["222"], metavar="ROUTE", help='one digit per boundary: "222"')
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="above 1: mixed routes")
    parser.add_argument(
        "--subjects", nargs="*", choices=SUBJECTS, default=[s for s in SUBJECTS if s not in OPTIONAL_SUBJECTS]
    )
    parser.add_argument(
        "--reduce", nargs="+", default=[], metavar="SPEC", help="training-free reductions of the stock model too"
    )
    parser.add_argument(
        "--quantize", nargs="+", default=[], choices=("int8", "int4", "fp8"), help="dpn_rt on quantised engines too"
    )
    parser.add_argument(
        "--peers", type=Path, default=None, metavar="PYTHON", help="OpenVINO and llama.cpp too; `make bench-peers`"
    )
    parser.add_argument("--compile", action="store_true", help="transformers under torch.compile too, where that works")
    parser.add_argument("--tensorrt", action="store_true", help="dpn_rt on TensorRT plans too, where that works")
    parser.add_argument(
        "--eager-batch", type=int, default=None, metavar="N", help="no eager rows of larger batches, which take longest"
    )
    parser.add_argument("--mix", choices=MIXES, default="quarters", help="routes of a mixed batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="decode steps per round")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--cache", type=Path, default=None, help="keep the engine here for the next run")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    options = parser.parse_args(arguments)
    if not all(len(route) == 3 and set(route) <= set("012") for route in options.routes):
        parser.error(f"--routes: expected three digits from 0 to 2 each, got {' '.join(options.routes)}")
    options.routes = [tuple(int(digit) for digit in route) for route in options.routes]
    if options.compile and "compiled" not in options.subjects:
        options.subjects.insert(0, "compiled")
    if options.tensorrt and "tensorrt" not in options.subjects:
        options.subjects.append("tensorrt")
    if options.peers is not None and (options.device != "cpu" or options.dtype != "bfloat16"):
        parser.error("--peers: rows of other engines are for --device cpu and --dtype bfloat16")
    if isinstance(SHAPES[options.shape].vision, HrConfig):  # transformers has no such model
        options.subjects = [subject for subject in options.subjects if subject not in DENSE_SUBJECTS]
    if "tensorrt" in options.subjects and options.device != "cuda":
        parser.error("rows of TensorRT plans need --device cuda")
    if min(options.batch) < 1 or options.repeats < 1 or options.tokens < 1:
        parser.error("--batch, --repeats and --tokens must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    escape_output()
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        result = measure(options)
    except WrongWorkError as error:
        sys.exit(str(error))
    print_table(result)
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
