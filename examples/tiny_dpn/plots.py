"""Plots of the evaluation: accuracy against FLOPs, routes per question kind, pyramids over pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from PIL import Image, ImageDraw, ImageFont

from dpn_rt import LLM, SamplingParams
from dpn_rt.drawing import draw_pyramid
from dpn_rt.outputs import Pyramid
from examples.tiny_dpn.answers import MAX_TOKENS, chat_messages
from examples.tiny_dpn.data import KINDS, LEVELS, QUESTIONS, Sample

Json = Mapping[str, Any]
DPI = 120
MARKERS = {"coarse": "o", "middle": "s", "fine": "^"}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart."""
LINE_STYLES = ("-", "--")
LINE_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
OTHER_COLOR = "#555555"
MOST_ROUTES = 7
"""Number of routes with a color of their own; the others share one."""


def accuracy_against_flops(runs: Sequence[Json], path: Path) -> None:
    """One point per model and level."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=DPI, layout="constrained")
    for index, run in enumerate(runs):
        color = COLORS[index % len(COLORS)]
        groups = run["summary"]["levels"]
        points = [(groups[level]["flops_ratio"], 100 * groups[level]["accuracy"]) for level in LEVELS]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1, alpha=0.5)
        for level, (x, y) in zip(LEVELS, points, strict=True):
            axes.scatter(x, y, color=color, marker=MARKERS[level], s=60, label=f"{run['model']}, {level}")
    axes.set_xlabel("decoder prefill FLOPs / dense")
    axes.set_ylabel("right answers, %")
    axes.set_xlim(0, 1.05)
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, ncols=len(runs), loc="outside lower center")
    figure.savefig(path)
    pyplot.close(figure)


def methods_against_flops(points: Sequence[Json], path: Path) -> None:
    """One line a method through its settings: all questions on the left, those of fine print on the right."""
    methods = list(dict.fromkeys(point["method"] for point in points))
    figure, grid = pyplot.subplots(1, 2, figsize=(11, 5.2), dpi=DPI, layout="constrained", sharey=True)
    for axes, title in zip(grid, ("all questions", "fine print: a number, a word, a digit"), strict=True):
        for index, method in enumerate(methods):
            own = [point for point in points if point["method"] == method]
            groups = [point["overall"] if axes is grid[0] else point["levels"]["fine"] for point in own]
            axes.plot(
                [group["flops_ratio"] for group in groups],
                [100 * group["accuracy"] for group in groups],
                LINE_STYLES[index // len(COLORS)],
                color=COLORS[index % len(COLORS)],
                marker=LINE_MARKERS[index % len(LINE_MARKERS)],
                markersize=5,
                linewidth=1.2,
                label=method,
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("decoder prefill FLOPs / dense")
        axes.set_xlim(0, 1.05)
        axes.set_ylim(-3, 103)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("right answers, %")
    figure.legend(*grid[0].get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower center")
    figure.savefig(path)
    pyplot.close(figure)


def routes_per_kind(run: Json, path: Path) -> None:
    """One bar per question kind, divided by route."""
    routes: dict[str, dict[str, int]] = run["summary"]["routes"]
    totals: dict[str, int] = {}
    for counts in routes.values():
        for route, count in counts.items():
            totals[route] = totals.get(route, 0) + count
    frequent = sorted(totals, key=lambda route: -totals[route])[:MOST_ROUTES]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=DPI, layout="constrained")
    kinds = list(KINDS)
    left = [0.0] * len(kinds)
    colors = pyplot.get_cmap("viridis")
    for index, route in enumerate([*frequent, "other"]):
        shares = [_share(routes[kind], route, frequent) for kind in kinds]
        if any(shares):
            color = OTHER_COLOR if route == "other" else colors(index / max(1, len(frequent) - 1))
            axes.barh(
                kinds, shares, left=left, label=route or "nothing pooled", color=color, edgecolor="white", linewidth=0.5
            )
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_yticks(range(len(kinds)), [f"{kind} ({KINDS[kind]})" for kind in kinds])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("questions, %")
    axes.legend(title="kernel per boundary", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)
    pyplot.close(figure)


def _share(counts: Mapping[str, int], route: str, frequent: Sequence[str]) -> float:
    chosen = counts.get(route, 0)
    if route == "other":
        chosen = sum(count for name, count in counts.items() if name not in frequent)
    return 100 * chosen / sum(counts.values())


def pyramids(llm: LLM, samples: Sequence[Sample], kinds: Sequence[str], path: Path) -> None:
    """One row per sample and question kind: the patches that each stage saw as one visual token."""
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 15)
    rows = []
    for sample in samples:
        conversations = [chat_messages(sample.image, QUESTIONS[kind]) for kind in kinds]
        outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
        for kind, output in zip(kinds, outputs, strict=True):
            picture = draw_pyramid(sample.image, output.pyramid, side=224)
            caption = f"{QUESTIONS[kind]}  →  {output.outputs[0].text.strip()}   (route {route_name(output.pyramid)})"
            rows.append(_captioned(picture, caption, font))
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    sheet.save(path)


def route_name(pyramid: Pyramid) -> str:
    """Kernel per boundary, such as "1x1, 2x2, skipped"; "none" for a model without boundaries."""
    kernels = ["skipped" if kernel is None else f"{kernel[0]}x{kernel[1]}" for kernel in pyramid.kernels]
    return ", ".join(kernels) or "none"


def _captioned(picture: Image.Image, caption: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    width = max(picture.width, int(font.getlength(caption)) + 5)
    result = Image.new("RGB", (width, picture.height + 30), "white")
    ImageDraw.Draw(result).text((2, 6), caption, fill="black", font=font)
    result.paste(picture, (0, 26))
    return result
