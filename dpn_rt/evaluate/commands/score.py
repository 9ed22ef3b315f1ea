"""`evaluate score`: answers to numbers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpn_rt.evaluate.scorers.benchmark import Benchmark
    from dpn_rt.evaluate.scorers.truth import Inputs, Truth


def add_parser(commands: Any) -> None:
    """Adds the command to a parser's commands."""
    parser = commands.add_parser(
        "score", help="score answers files", description="Score answers files by a benchmark's published rule."
    )
    parser.set_defaults(run=run)
    parser.add_argument("benchmark", metavar="BENCHMARK", help="its name, see docs/evaluate.md")
    add_inputs(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Adds what every command takes that scores answers."""
    parser.add_argument(
        "--answers-file", type=Path, nargs="+", action="extend", required=True, metavar="FILE", help="of evaluate run"
    )
    parser.add_argument(
        "--annotations", type=Path, metavar="PATH", help="the right answers (default the question file's own)"
    )
    parser.add_argument("--question-file", type=Path, metavar="FILE", help="that was answered")
    parser.add_argument("--split", default="test", help="of ScienceQA (default test)")


def inputs_of(options: argparse.Namespace) -> Inputs:
    """Where the right answers are.

    Raises:
        EvaluationError: nowhere.
    """
    from dpn_rt.errors import EvaluationError
    from dpn_rt.evaluate.scorers.truth import Inputs

    annotations = options.annotations or options.question_file
    if annotations is None:
        raise EvaluationError("no right answers: expected --annotations, or a --question-file that has them")
    return Inputs(annotations, options.question_file, options.split)


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    print_scores(read_truths(options.benchmark, inputs_of(options)), options.answers_file, as_json=options.json)
    return 0


@dataclass(frozen=True)
class Truths:
    """A benchmark and its right answers."""

    name: str
    benchmark: Benchmark
    truths: list[Truth]


def read_truths(name: str, inputs: Inputs) -> Truths:
    """The right answers of a benchmark.

    Raises:
        EvaluationError: there is none of the name, or the annotations cannot be used.
    """
    from dpn_rt.evaluate.scorers.table import benchmark

    chosen = benchmark(name)
    return Truths(name, chosen, chosen.read(inputs))


def print_scores(truths: Truths, answers_files: Sequence[Path], *, as_json: bool) -> None:
    """Scores answers files and prints the numbers.

    Raises:
        EvaluationError: a file cannot be used.
    """
    from dpn_rt.evaluate.scorers.truth import read_answers

    scores = [truths.benchmark.score(truths.truths, read_answers(path)) for path in answers_files]
    if as_json:
        values = [
            {"answers_file": str(path), "questions": len(score.graded), "missing": score.num_missing}
            | {"unused": score.num_unused, "metrics": dict(score.metrics)}
            for path, score in zip(answers_files, scores, strict=True)
        ]
        print(json.dumps({"benchmark": truths.name, "scores": values}), flush=True)
        return
    for path, score in zip(answers_files, scores, strict=True):
        print(f"{path}: {score.title}, {len(score.graded)} questions")
        width = max(len(metric) for metric in score.metrics)
        for metric, value in score.metrics.items():
            print(f"  {metric:<{width}}  {value:.2f}", flush=True)
        if score.num_missing:
            print(f"  {score.num_missing} questions have no answer, and count as wrong", file=sys.stderr)
        if score.num_unused:
            print(f"  {score.num_unused} answers are to no question of the annotations", file=sys.stderr)
