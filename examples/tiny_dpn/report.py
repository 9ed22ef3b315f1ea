"""The evaluation as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from examples.tiny_dpn.data import KINDS, LEVELS

Json = Mapping[str, Any]


def markdown(evaluation: Json) -> str:
    """Tables of `evaluation.json`."""
    parts = [f"{evaluation['scenes']} held-out scenes, {evaluation['questions']} questions.", _models(evaluation)]
    parts += [_kinds(run) for run in evaluation["runs"]]
    parts += [_disagreements(run) for run in evaluation["runs"] if run["disagreements"]]
    return "\n\n".join(parts) + "\n"


def _models(evaluation: Json) -> str:
    header = ["model", "dtype", "all", *LEVELS, "prefill FLOPs", "last stage, coarse", "last stage, fine"]
    header += ["fine/coarse", "agrees with eager"]
    rows = []
    for run in evaluation["runs"]:
        levels, overall = run["summary"]["levels"], run["summary"]["overall"]
        row = [run["model"], run["dtype"], percent(overall["accuracy"])]
        row += [percent(levels[level]["accuracy"]) for level in LEVELS]
        row += [f"{overall['flops_ratio']:.3f} x dense"]
        row += [f"{levels[level]['visual_tokens'][-1]:.1f} tokens" for level in ("coarse", "fine")]
        row += [f"{run['summary']['fine_to_coarse']:.2f}", _agreement(run)]
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
        rows.append(
            [kind, level, percent(group["accuracy"]), tokens, f"{group['flops_ratio']:.3f}", f"{route} ({share})"]
        )
    header = ["question", "level", "accuracy", "visual tokens per stage", "FLOPs / dense", "most frequent route"]
    return f"{run['model']}, {run['dtype']}:\n\n" + table(header, rows)


def _disagreements(run: Json) -> str:
    rows = [
        [str(d["scene"]), d["kind"], repr(d["runtime"]), repr(d["eager"]), f"{d['margin']:.2g}"]
        for d in run["disagreements"]
    ]
    title = f"{run['model']}, {run['dtype']}: where runtime and eager differ"
    return f"{title}\n\n" + table(["scene", "question", "runtime", "eager", "eager's margin (logits)"], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float) -> str:
    """0.876 -> "87.6 %"."""
    return f"{100 * share:.1f} %"
