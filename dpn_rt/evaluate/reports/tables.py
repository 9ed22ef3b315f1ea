"""Summaries -> Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from dpn_rt.evaluate.reports.summary import (
    SKIPPED,
    RunSummary,
    categories,
    category_of,
    chosen_by_routers,
    points_by_category,
    routes_by_category,
)
from dpn_rt.evaluate.scorers.truth import Answer, Graded

COSTS = ("FLOPs / dense", "GFLOP", "visual tokens per stage", "first token, ms")
FOOTNOTE = (
    "FLOPs are those of the decoder's prefill, mean over the questions; / dense is the mean of the ratios. First token "
    "is the mean time from a question's first step to its first token: it depends on how many questions run at a time."
)


def runs_table(runs: Sequence[RunSummary]) -> tuple[list[str], list[list[str]]]:
    """Header and one line a run, as texts."""
    metric = runs[0].score.main[0]
    header = ["run", "method", "setting", "questions", "unanswered", metric, *COSTS]
    return header, [_run_line(run) for run in runs]


def _run_line(run: RunSummary) -> list[str]:
    tokens = ", ".join(f"{count:.4g}" for count in run.visual_tokens)
    counts = [str(len(run.score.graded)), str(run.score.num_missing)]
    return [
        run.name,
        run.method,
        run.setting,
        *counts,
        f"{run.value:.2f}",
        _text(run.flops_ratio, ".3f"),
        _text(None if run.flops is None else run.flops / 1e9, ".4g"),
        tokens or "-",
        _text(None if run.first_token is None else 1000 * run.first_token, ".1f"),
    ]


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def categories_table(runs: Sequence[RunSummary]) -> tuple[list[str], list[list[str]]]:
    """Header and one line a kind of question: per cent of each run."""
    points = [points_by_category(run) for run in runs]
    lines = [[name, *(_text(each.get(name), ".2f") for each in points)] for name in categories(runs)]
    return ["question", *(run.name for run in runs)], lines


def routes_table(run: RunSummary) -> tuple[list[str], list[list[str]]]:
    """Header and one line a kind of question: the most frequent routes of a run."""
    lines = []
    for name, counts in routes_by_category(run).items():
        total = counts.total()
        shares = [f"{route} ({100 * count / total:.0f} %)" for route, count in counts.most_common(3)]
        lines.append([name, *shares, *[""] * (3 - len(shares))])
    return ["question", "route", "second", "third"], lines


def markdown(title: str, runs: Sequence[RunSummary], pictures: Sequence[str]) -> str:
    """The whole report.

    Args:
        title: of the benchmark.
        runs: at least one.
        pictures: names of files beside the report.
    """
    parts = [f"# {title}", markdown_table(*runs_table(runs)), FOOTNOTE]
    shown = {runs[0].score.main[0], *(f"accuracy, {name}" for name in categories(runs))}
    names = [name for name in dict.fromkeys(name for run in runs for name in run.score.metrics) if name not in shown]
    if names:
        lines = [[name, *(_text(run.score.metrics.get(name), ".2f") for run in runs)] for name in names]
        parts += ["## Metrics", markdown_table(["metric", *(run.name for run in runs)], lines)]
    header, lines = categories_table(runs)
    if lines:
        parts += ["## Kinds of questions", markdown_table(header, lines)]
    for run in chosen_by_routers(runs):
        header, lines = routes_table(run)
        if lines:
            parts += [f"## Routes of {escaped(run.name)}", markdown_table(header, lines)]
    parts += [f"![{name.partition('.')[0].replace('_', ' ')}]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, whose cells may have any characters."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(escaped(cell) for cell in row)} |" for row in rows)


def escaped(text: str) -> str:
    """A text within a line of Markdown."""
    return " ".join(text.split()).replace("|", "\\|")


def runs_csv(runs: Sequence[RunSummary]) -> bytes:
    """One line a run, with all its metrics."""
    names = list(dict.fromkeys(name for run in runs for name in run.score.metrics))
    columns = ["run", "method", "setting", "questions", "unanswered", "flops", "flops_ratio", "visual_tokens"]
    columns += ["first_token_seconds", *names]
    return _csv(columns, (_run_values(run, names) for run in runs))


def _run_values(run: RunSummary, names: Sequence[str]) -> list[object]:
    tokens = " ".join(f"{count:g}" for count in run.visual_tokens)
    values = [run.name, run.method, run.setting, len(run.score.graded), run.score.num_missing]
    costs = [run.flops, run.flops_ratio, tokens, run.first_token]
    return [*values, *costs, *(run.score.metrics.get(name) for name in names)]


def questions_csv(runs: Sequence[RunSummary]) -> bytes:
    """One line an answer."""
    columns = [
        "run",
        "question_id",
        "round_id",
        "category",
        "prompt",
        "answer",
        "truth",
        "points",
        "route",
        "reduction",
    ]
    columns += ["visual_tokens", "flops", "dense_flops", "first_token_seconds"]
    return _csv(columns, (_answer_values(run.name, *each) for run in runs for each in run.answers))


def _answer_values(run: str, graded: Graded, answer: Answer) -> list[object]:
    trace = answer.metadata
    route = " ".join(kernel or SKIPPED for kernel in trace.get("route") or ())
    said = [run, answer.question_id, answer.round_id, category_of(graded, answer), answer.prompt, answer.text]
    costs = [trace.get("reduction"), " ".join(map(str, trace.get("visual_tokens") or ())), trace.get("flops")]
    times = [trace.get("dense_flops"), (trace.get("seconds") or {}).get("first_token")]
    return [*said, "; ".join(dict.fromkeys(graded.truth.answers)), graded.points, route, *costs, *times]


def _csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode()
