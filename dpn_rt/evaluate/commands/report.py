"""`evaluate report`: scored answers to tables, plots and a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.commands.score import add_inputs, inputs_of

if TYPE_CHECKING:
    from dpn_rt.evaluate.reports.summary import RunSummary


def add_parser(commands: Any) -> None:
    """Adds the command to a parser's commands."""
    parser = commands.add_parser(
        "report",
        help="tables and plots of answers files",
        description="Score answers files, and write report.md, runs.csv, questions.csv and plots into a directory.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("benchmark", metavar="BENCHMARK", help="its name, see docs/evaluate.md")
    add_inputs(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="made if need be")
    parser.add_argument("--html", action="store_true", help="write report.html, with samples that two runs differ in")
    parser.add_argument("--engine", type=Path, metavar="DIR", help="for --html: to draw what was seen of pictures")
    parser.add_argument("--image-folder", type=Path, default=Path(), metavar="DIR", help="for --html (default here)")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar="FILE",
        help="answers files that --html compares (default the first two)",
    )
    parser.add_argument("--most", type=int, default=50, metavar="N", help="samples on the page (default 50)")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from dpn_rt.evaluate.reports.summary import summarize
    from dpn_rt.evaluate.reports.tables import markdown, questions_csv, runs_csv
    from dpn_rt.evaluate.scorers.table import benchmark
    from dpn_rt.evaluate.scorers.truth import read_answers
    from dpn_rt.evaluate.writing import check_target, write_whole

    check_target(options.output / "report.md")
    if options.compare is not None and not options.html:
        raise EvaluationError("--compare: expected --html as well")
    if options.html and (options.engine is None or options.question_file is None):
        raise EvaluationError("--html: expected --engine and --question-file too, for the pictures")
    chosen = benchmark(options.benchmark)
    truths = chosen.read(inputs_of(options))
    paths = options.answers_file
    runs = [summarize(path, chosen.score(truths, read_answers(path))) for path in paths]
    plots = _plots(runs)
    files = {"report.md": markdown(chosen.title, runs, list(plots)).encode(), "runs.csv": runs_csv(runs)}
    files |= {"questions.csv": questions_csv(runs), **plots}
    if options.html:
        files["report.html"] = _page(options, chosen.title, dict(zip(paths, runs, strict=True)), plots)
    for name, data in files.items():
        write_whole(options.output / name, data)
        print(options.output / name, flush=True)
    return 0


def _plots(runs: Sequence[RunSummary]) -> Mapping[str, bytes]:
    """The plots; none, with a note, where there is no matplotlib."""
    from dpn_rt.evaluate.reports.plots import draw_plots

    try:
        return draw_plots(runs)
    except EvaluationError as error:
        print(f"note: no plots: {error}", file=sys.stderr)
        return {}


def _page(
    options: argparse.Namespace, title: str, runs: Mapping[Path, RunSummary], plots: Mapping[str, bytes]
) -> bytes:
    from dpn_rt.evaluate.reports.page import page
    from dpn_rt.evaluate.reports.samples import differing, with_pictures
    from dpn_rt.evaluate.source import QuestionSource

    paths = options.compare or list(runs)[:2]
    unknown = next((path for path in paths if path not in runs), None)
    if unknown is not None:
        raise EvaluationError(f"--compare {unknown}: expected files of --answers-file")
    if len(paths) < 2:
        return page(title, list(runs.values()), plots, [], 0, None)
    first, second = (runs[path] for path in paths)
    samples = differing(first, second)
    source = QuestionSource(options.question_file, options.image_folder)
    shown = list(with_pictures(samples[: options.most], source, options.engine))
    return page(title, list(runs.values()), plots, shown, len(samples), (first.name, second.name))
