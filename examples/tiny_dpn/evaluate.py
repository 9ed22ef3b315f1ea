"""Ask held-out questions through the runtime; report accuracy, routes, FLOPs and agreement with eager.

python -m examples.tiny_dpn.evaluate --model dense=DIR --model static=DIR --model dpn=DIR --output DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpn_rt import LLM
from dpn_rt.builders.native import build_engine
from dpn_rt.errors import DpnError
from dpn_rt.evaluate.writing import write_whole
from dpn_rt.schema.dtypes import DType
from dpn_rt.terminal import escape_output
from examples.tiny_dpn import plots
from examples.tiny_dpn.agreement import compare_with_eager
from examples.tiny_dpn.answers import ask_runtime
from examples.tiny_dpn.data import Sample, sample
from examples.tiny_dpn.metrics import summarize
from examples.tiny_dpn.phase import TrainingError
from examples.tiny_dpn.report import markdown
from examples.tiny_dpn.train import check_writable

DTYPES: tuple[DType, ...] = ("float32", "bfloat16")
DRAWN_SCENES = 3
DRAWN_KINDS = ("background", "number")


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of the command."""

    models: Mapping[str, Path]
    output: Path
    scenes: int
    dtypes: Sequence[DType]
    eager: bool
    seed: int
    command: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    escape_output()
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(given)
    models = dict(options.model)
    if len(models) < len(options.model):
        parser.error("--model: every NAME must be another one")
    settings = Settings(
        models=models,
        output=options.output,
        scenes=options.scenes,
        dtypes=list(dict.fromkeys(options.dtype or DTYPES)),
        eager=options.eager,
        seed=options.seed,
        command=shlex.join(["python", "-m", "examples.tiny_dpn.evaluate", *given]),
    )
    try:
        check_writable(settings.output)
        evaluate(settings)
    except (DpnError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_dpn.evaluate", description="Evaluate checkpoints.")
    parser.add_argument(
        "--model", action="append", required=True, type=_named, metavar="NAME=DIR", help="checkpoint (repeat)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for tables and pictures")
    parser.add_argument("--scenes", type=_count, default=200, metavar="N", help="ten questions each (default 200)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeat; default both")
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True, help="compare with eager")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default 0)")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of scenes, at least 1")
    return int(text)


def _named(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=DIR, such as dpn=runs/tiny_dpn/dpn/checkpoint")
    return name, Path(path)


def evaluate(settings: Settings) -> dict[str, Any]:
    """Evaluate checkpoints and write evaluation.json, evaluation.md and the pictures into the output directory.

    Raises:
        DpnError: a checkpoint is incomplete or damaged; all are built before any question is asked.
    """
    started, output, first_dtype = time.perf_counter(), settings.output, settings.dtypes[0]
    with tempfile.TemporaryDirectory() as directory:
        engines = {
            (name, dtype): build_engine(path, Path(directory) / f"{name}-{dtype}", dtype=dtype).path
            for name, path in settings.models.items()
            for dtype in settings.dtypes
        }
        samples = [sample("test", index, settings.seed) for index in range(settings.scenes)]
        runs = [_run(name, dtype, path, samples, settings.eager) for (name, dtype), path in engines.items()]
        drawn = LLM(engines[list(settings.models)[-1], first_dtype])
        plots.pyramids(drawn, samples[:DRAWN_SCENES], DRAWN_KINDS, output / "pyramids.png")
    evaluation = {
        "command": settings.command,
        "seed": settings.seed,
        "scenes": settings.scenes,
        "questions": sum(len(item.questions) for item in samples),
        "versions": {name: version(name) for name in ("dpn_rt", "torch", "transformers")},
        "python": platform.python_version(),
        "seconds": time.perf_counter() - started,
        "runs": runs,
    }
    write_whole(output / "evaluation.json", (json.dumps(evaluation, indent=1) + "\n").encode())
    write_whole(output / "evaluation.md", markdown(evaluation).encode())
    first = [run for run in runs if run["dtype"] == first_dtype]
    plots.accuracy_against_flops(first, output / "accuracy_flops.png")
    plots.routes_per_kind(first[-1], output / "routes.png")
    print(markdown(evaluation))
    return evaluation


def _run(name: str, dtype: str, engine: Path, samples: Sequence[Sample], eager: bool) -> dict[str, Any]:
    llm = LLM(engine)
    started = time.perf_counter()
    answers = ask_runtime(llm, samples, f"{name}, {dtype}")
    seconds = time.perf_counter() - started
    differ = compare_with_eager(llm, engine, samples, answers, f"{name}, {dtype}, eager") if eager else []
    return {
        "model": name,
        "dtype": dtype,
        "seconds": seconds,
        "summary": dataclasses.asdict(summarize(answers)),
        "agreement": 1 - len(differ) / len(answers) if eager else None,
        "disagreements": [dataclasses.asdict(item) for item in differ],
    }


if __name__ == "__main__":
    sys.exit(main())
