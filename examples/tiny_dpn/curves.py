"""Plot what training logged: python -m examples.tiny_dpn.curves RUN_DIR OUTPUT.png."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.tiny_dpn.data import KINDS, LEVELS
from examples.tiny_dpn.recipe import PHASES

DPI = 110
LINES = {"coarse": "-", "middle": "--", "fine": "-."}
Series = tuple[list[int], list[float]]


def read_scalars(folder: Path) -> dict[str, Series]:
    """Name -> (steps, values) of one phase. A step that a killed run left twice counts with its last value."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    result = {}
    for name in events.Tags()["scalars"]:
        points = {event.step: event.value for event in events.Scalars(name)}
        steps = sorted(points)
        result[name] = steps, [points[step] for step in steps]
    return result


def draw(run: Path, path: Path) -> None:
    """One row per phase: losses on the left, right answers per question kind (DPN: visual tokens) on the right."""
    phases = [name for name in PHASES if (run / name).is_dir()]
    figure, grid = pyplot.subplots(
        len(phases), 2, figsize=(11, 2.6 * len(phases)), dpi=DPI, layout="constrained", squeeze=False
    )
    for phase, (left, right) in zip(phases, grid, strict=True):
        scalars = read_scalars(run / phase)
        for name in ("language", "patch/thing", "patch/color", "patch/character", "patch/place"):
            if name in scalars:
                left.plot(*scalars[name], label=name)
        left.set_title(f"{phase}: loss")
        left.set_yscale("log")
        left.legend(fontsize=7)
        for kind, level in KINDS.items():
            if f"right/{kind}" in scalars:
                right.plot(*scalars[f"right/{kind}"], LINES[level], label=kind, linewidth=1)
        right.set_title(f"{phase}: share of right answers")
        if right.lines:
            right.legend(fontsize=7, ncols=2)
        if "tokens/fine" in scalars:
            _draw_tokens(right, scalars)
    figure.savefig(path)
    pyplot.close(figure)


def _draw_tokens(axes: Axes, scalars: dict[str, Series]) -> None:
    axes.clear()
    axes.set_title("dpn: visual tokens in the last stage")
    for level in LEVELS:
        axes.plot(*scalars[f"tokens/{level}"], LINES[level], label=level)
    axes.legend(fontsize=7)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
