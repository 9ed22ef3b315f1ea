"""The numbers of one scored answers file."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dpn_rt.evaluate.scorers.benchmark import Score
from dpn_rt.evaluate.scorers.truth import Answer, Graded

FORCED = "forced route"
"""Method of runs that take one route."""
SKIPPED = "skipped"
"""A boundary that pooled nothing, in a route."""


@dataclass(frozen=True)
class RunSummary:
    """One run. Costs are means over its answers; None where the answers have no trace."""

    name: str
    """Of the answers file, without its ending."""
    method: str
    """What the runs of one line in a plot have in common, such as "fastv"."""
    setting: str
    """What tells them apart, such as a SPEC."""
    score: Score
    flops: float | None
    """Of the decoder's prefill."""
    flops_ratio: float | None
    """The same over those without reduction."""
    visual_tokens: tuple[float, ...]
    """Per stage; empty where answers have stages of several numbers."""
    first_token: float | None
    """Seconds from the first step of a request to its first token."""

    @property
    def value(self) -> float:
        """The benchmark's own metric."""
        return self.score.main[1]

    @property
    def answers(self) -> Iterator[tuple[Graded, Answer]]:
        """Every answer with its question."""
        return ((graded, answer) for graded in self.score.graded for answer in graded.answers)


def summarize(path: Path, score: Score) -> RunSummary:
    """The numbers of an answers file that was scored."""
    traces = [answer.metadata for graded in score.graded for answer in graded.answers]
    settings: Mapping[str, Any] = next(
        (trace["settings"] for trace in traces if isinstance(trace.get("settings"), dict)), {}
    )
    method, setting = _method(settings)
    costed = [trace for trace in traces if trace.get("flops") and trace.get("dense_flops")]
    stages = [trace["visual_tokens"] for trace in traces if trace.get("visual_tokens")]
    is_regular = len({len(counts) for counts in stages}) == 1
    times = [seconds for seconds in map(_first_token, traces) if seconds is not None]
    return RunSummary(
        name=path.name.removesuffix(".jsonl"),
        method=method,
        setting=setting,
        score=score,
        flops=fmean(trace["flops"] for trace in costed) if costed else None,
        flops_ratio=fmean(trace["flops"] / trace["dense_flops"] for trace in costed) if costed else None,
        visual_tokens=tuple(fmean(counts) for counts in zip(*stages, strict=True)) if is_regular else (),
        first_token=fmean(times) if times else None,
    )


def _method(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Method and setting of a run."""
    if "reduce" in settings:
        spec = str(settings["reduce"])
        return "+".join(part.partition(":")[0] for part in spec.split("+")), spec
    if "route" in settings:
        return FORCED, ",".join("none" if expert is None else str(expert) for expert in settings["route"])
    if "router_bias" in settings:
        return "router bias", f"router_bias={settings['router_bias']:g}"
    return "as built", ""


def _first_token(trace: Mapping[str, Any]) -> float | None:
    """Without the wait for a place in a batch, which depends on the number of questions at one time."""
    seconds = trace.get("seconds") or {}
    first, queue = seconds.get("first_token"), seconds.get("queue")
    return None if first is None else first - (queue or 0.0)


def category_of(graded: Graded, answer: Answer) -> str:
    """The kind of question, as the question file or the annotations have it."""
    return str(answer.metadata.get("category") or graded.truth.category)


def categories(runs: Sequence[RunSummary]) -> list[str]:
    """All kinds of questions, in the order of the questions."""
    found = (category_of(graded, answer) for run in runs for graded, answer in run.answers)
    return [name for name in dict.fromkeys(found) if name]


def points_by_category(run: RunSummary) -> dict[str, float]:
    """Kind of question -> mean points, in per cent."""
    points: dict[str, list[float]] = defaultdict(list)
    for graded, answer in run.answers:
        points[category_of(graded, answer)].append(graded.points)
    return {name: 100 * fmean(each) for name, each in points.items()}


def chosen_by_routers(runs: Sequence[RunSummary]) -> list[RunSummary]:
    """The runs whose routes say something about the questions."""
    return [run for run in runs if run.method != FORCED]


def routes_by_category(run: RunSummary) -> dict[str, Counter[str]]:
    """Kind of question -> how often each route was taken; empty for runs without routers."""
    routes: dict[str, Counter[str]] = defaultdict(Counter)
    for graded, answer in run.answers:
        route = answer.metadata.get("route")
        if route:
            name = category_of(graded, answer) or "all"
            routes[name][" ".join(kernel or SKIPPED for kernel in route)] += 1
    return dict(routes)


def last_stage_tokens(run: RunSummary) -> list[int]:
    """Visual tokens of the last stage, of each answer."""
    counts = (answer.metadata.get("visual_tokens") for _, answer in run.answers)
    return [int(each[-1]) for each in counts if each]
