"""Markdown tables of the evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from examples.tiny_dpn.data import KINDS, LEVELS

Json = Mapping[str, Any]
FOOTNOTE = (
    "Prefill: GFLOP of the decoder, mean over the questions, text rows included; / dense is the mean over the "
    "questions of the ratio to the dense model on the same question. Fine/coarse: visual tokens of the last stage, "
    "mean over the pictures of mean over mean; in brackets the ratio of the means over all pictures."
)


def markdown(evaluation: Json) -> str:
    """Tables of `evaluation.json`."""
    versions = ", ".join(f"{name} {version}" for name, version in evaluation["versions"].items())
    title = f"{evaluation['scenes']} held-out scenes (seed {evaluation['seed']}), {evaluation['questions']} questions."
    parts = [f"{title} {versions}; {evaluation['seconds']:.0f} s.", _models(evaluation), FOOTNOTE]
    parts += [_kinds(run) for run in evaluation["runs"]]
    parts += [_disagreements(run) for run in evaluation["runs"] if run["disagreements"]]
    return "\n\n".join(parts) + "\n"


def _models(evaluation: Json) -> str:
    header = ["model", "dtype", "all", *LEVELS, "prefill, GFLOP", "/ dense", "last stage, coarse", "last stage, fine"]
    header += ["fine/coarse", "agrees with eager"]
    rows = []
    for run in evaluation["runs"]:
        levels, overall = run["summary"]["levels"], run["summary"]["overall"]
        row = [run["model"], run["dtype"], percent(overall["accuracy"])]
        row += [percent(levels[level]["accuracy"]) for level in LEVELS]
        row += [f"{overall['flops'] / 1e9:.3f}", f"{overall['flops_ratio']:.3f}"]
        row += [f"{levels[level]['visual_tokens'][-1]:.1f} tokens" for level in ("coarse", "fine")]
        ratio = f"{run['summary']['fine_to_coarse']:.2f} ({run['summary']['fine_to_coarse_of_means']:.2f})"
        row += [ratio, _agreement(run)]
        rows.append(row)
    return table(header, rows)


def _agreement(run: Json) -> str:
    if run["agreement"] is None:
        return "not asked"
    return f"{100 * run['agreement']:.2f} %"


def _kinds(run: Json) -> str:
    rows = []
    for kind, level in KINDS.items():
        group = run["summary"]["kinds"][kind]
        routes = run["summary"]["routes"][kind]
        route = next(iter(routes))
        tokens = ", ".join(f"{count:.0f}" for count in group["visual_tokens"])
        share = percent(routes[route] / group["questions"])
        row = [kind, level, f"{group['right']} of {group['questions']}", percent(group["accuracy"]), tokens]
        rows.append([*row, f"{group['flops_ratio']:.3f}", f"{route or 'nothing pooled'} ({share})"])
    header = ["question", "level", "right", "accuracy", "visual tokens per stage", "FLOPs / dense"]
    header.append("most frequent route")
    return f"{run['model']}, {run['dtype']}:\n\n" + table(header, rows)


def _disagreements(run: Json) -> str:
    rows = [
        [
            str(d["scene"]),
            d["kind"],
            *(f"`{d[name]!r}`" for name in ("runtime", "runtime_alone", "eager")),
            *_margins(d),
        ]
        for d in run["disagreements"]
    ]
    title = f"{run['model']}, {run['dtype']}: where runtime and eager differ (margins: runtime asked alone; eager)"
    header = ["scene", "question", "runtime, in a batch", "alone", "eager", "token", "margin of logits"]
    return f"{title}\n\n" + table([*header, "margins of routers"], rows)


def _margins(disagreement: Json) -> list[str]:
    runtime, eager = (
        ", ".join(_number(margin) for margin in disagreement[f"{side}_router_margins"]) or "-"
        for side in ("runtime", "eager")
    )
    logits = f"{_number(disagreement['runtime_margin'])}; {_number(disagreement['eager_margin'])}"
    return [str(disagreement["position"]), logits, f"{runtime}; {eager}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float) -> str:
    """0.876 -> "87.6 %"."""
    return f"{100 * share:.1f} %"
