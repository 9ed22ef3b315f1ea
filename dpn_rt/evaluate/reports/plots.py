"""Plots of runs. They need the package matplotlib."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dpn_rt.evaluate.optional import need
from dpn_rt.evaluate.reports.summary import RunSummary, chosen_by_routers, last_stage_tokens, routes_by_category

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
OTHER_COLOR = "#555555"
MOST_ROUTES = 7
"""Routes with a color of their own; the others share one."""
MOST_PANELS = 4
"""Runs whose routes are drawn."""


def draw_plots(runs: Sequence[RunSummary]) -> dict[str, bytes]:
    """File name -> PNG, of the plots that the runs have numbers for.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    need("matplotlib", "a plot")
    plots: dict[str, Callable[[Sequence[RunSummary]], Figure | None]] = {
        "accuracy_flops.png": _against_flops,
        "accuracy_time.png": _against_time,
        "routes.png": _routes,
        "visual_tokens.png": _visual_tokens,
    }
    drawn = {}
    for name, draw in plots.items():
        figure = draw(runs)
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": None})
            drawn[name] = buffer.getvalue()
    return drawn


def _figure(width: float, height: float) -> Figure:
    """Not one of pyplot, which keeps every figure."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _against_flops(runs: Sequence[RunSummary]) -> Figure | None:
    points = [(run, run.flops_ratio) for run in runs if run.flops_ratio is not None]
    return _lines(runs, points, "decoder prefill FLOPs / dense")


def _against_time(runs: Sequence[RunSummary]) -> Figure | None:
    points = [(run, 1000 * run.first_token) for run in runs if run.first_token is not None]
    return _lines(runs, points, "first step to first token, ms")


def _lines(runs: Sequence[RunSummary], points: Sequence[tuple[RunSummary, float]], label: str) -> Figure | None:
    """One line a method, through its settings by their cost."""
    if not points:
        return None
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    for index, method in enumerate(dict.fromkeys(run.method for run, _ in points)):
        own = sorted(((x, run.value) for run, x in points if run.method == method))
        axes.plot(
            [x for x, _ in own],
            [value for _, value in own],
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle="--" if index >= len(COLORS) else "-",
            label=method,
        )
    axes.set_xlabel(label)
    axes.set_ylabel(f"{runs[0].score.title}: {runs[0].score.main[0]}")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _routes(runs: Sequence[RunSummary]) -> Figure | None:
    """A panel a run, a bar a kind of question, divided by route."""
    routed = [(run, routes) for run in chosen_by_routers(runs) if (routes := routes_by_category(run))][:MOST_PANELS]
    if not routed:
        return None
    totals: Counter[str] = Counter()
    for _, routes in routed:
        for counts in routes.values():
            totals.update(counts)
    frequent = [route for route, _ in totals.most_common(MOST_ROUTES)]
    kinds = list(dict.fromkeys(kind for _, routes in routed for kind in routes))
    figure = _figure(4.5 * len(routed) + 2.5, 1.5 + 0.35 * len(kinds))
    panels: Sequence[Axes] = figure.subplots(1, len(routed), sharey=True, squeeze=False)[0]
    for axes, (run, routes) in zip(panels, routed, strict=True):
        _route_bars(axes, kinds, routes, frequent)
        axes.set_title(run.name, fontsize=9)
        axes.set_xlabel("questions, %")
        axes.set_xlim(0, 100)
    panels[0].set_yticks(range(len(kinds)), kinds)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="kernel per boundary", fontsize=8, loc="outside right center")
    return figure


def _route_bars(axes: Axes, kinds: Sequence[str], routes: dict[str, Counter[str]], frequent: Sequence[str]) -> None:
    left = [0.0] * len(kinds)
    for index, route in enumerate([*frequent, "other"]):
        counts = [routes.get(kind, Counter()) for kind in kinds]
        chosen = [
            sum(n for name, n in each.items() if name not in frequent) if route == "other" else each[route]
            for each in counts
        ]
        shares = [100 * n / max(each.total(), 1) for n, each in zip(chosen, counts, strict=True)]
        color = OTHER_COLOR if route == "other" else COLORS[index % len(COLORS)]
        axes.barh(range(len(kinds)), shares, left=left, label=route, color=color, edgecolor="white", linewidth=0.5)
        left = [a + b for a, b in zip(left, shares, strict=True)]


def _visual_tokens(runs: Sequence[RunSummary]) -> Figure | None:
    """A box a run."""
    counts = [(run, tokens) for run in runs if (tokens := last_stage_tokens(run))]
    if not counts:
        return None
    figure = _figure(2 + 0.7 * len(counts), 4.5)
    axes = figure.subplots()
    axes.boxplot([tokens for _, tokens in counts], widths=0.6, medianprops={"color": COLORS[1]})
    labels = [f"{run.method} {run.setting}".strip() for run, _ in counts]
    axes.set_xticks(range(1, len(counts) + 1), labels, fontsize=7, rotation=30, ha="right")
    axes.set_ylabel("visual tokens of the last stage")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, axis="y")
    return figure
