"""Writes what was measured on a GPU into docs/performance.md, with a plot of time against FLOPs for each model.

    python benchmarks/document.py [--latency FILE ...] [--ops FILE] [--docs DIR]

Reads the JSON of `latency.py` and `ops.py`, and replaces the text between the marks in the document.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: `benchmarks` is found in the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import ops
from benchmarks.comparison import report
from dpn_rt.terminal import escape_output

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured on a GPU: begin -->", "<!-- measured on a GPU: end -->"


def printed(function: Callable[[], None]) -> str:
    """What `function` prints, as a Markdown block."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        function()
    return f"```\n{text.getvalue().strip()}\n```"


def machine_line(machine: dict[str, Any]) -> str:
    gpu = machine["gpu"]
    if gpu is None:
        return f"{machine['cpu']}, torch {machine['torch']}, transformers {machine['transformers']}."
    return (
        f"{gpu['name']} (capability {gpu['capability']}, driver {gpu['driver']}), CUDA {gpu['cuda']}, torch "
        f"{machine['torch']}, transformers {machine['transformers']}, Python {machine['python']}."
    )


def plot_name(latency: dict[str, Any]) -> str:
    """File name of a model's plot."""
    return f"gpu_prefill_{latency['shape']}.png"


def section(models: Sequence[dict[str, Any]], kernels: dict[str, Any]) -> str:
    """The Markdown section, marks included."""
    tables = []
    for latency in models:
        tables += [
            machine_line(latency["machine"]),
            f"![Prefill time against FLOPs, {latency['shape']}]({plot_name(latency)})",
            printed(functools.partial(report.print_table, latency)),
        ]
    return "\n\n".join(
        [
            BEGIN,
            *tables,
            "Kernels, each against torch's and against the copies and matrix products of the same run:",
            printed(lambda: ops.print_table(kernels["kernels"])),
            END,
        ]
    )


def with_section(document: str, text: str) -> str:
    """The document with `text` in place of its marked section, or at its end where it has none."""
    before, begin, rest = document.partition(BEGIN)
    if not begin:
        return f"{document.rstrip()}\n\n{text}\n"
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the document has {BEGIN!r} without {END!r}")
    return f"{before}{text}{after}"


def least_seconds(latency: dict[str, Any], flops: float) -> float:
    """Least seconds of a prefill of `flops`: its products at the measured rate, or one read of all weights."""
    limits = latency["limits"]
    products = flops / limits["gemm_flops_per_second"]["median"]
    return max(products, latency["decode_weight_bytes"] / limits["read_bytes_per_second"]["median"])


def plot(latency: dict[str, Any], file: Path) -> None:
    """Plot the prefill time of every row against its FLOPs, with the limit as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for subject in dict.fromkeys(row["subject"] for row in latency["rows"]):
        rows = [row for row in latency["rows"] if row["subject"] == subject]
        flops = [row["computed_prefill_flops"] / 1e12 for row in rows]
        axes.plot(flops, [row["prefill"]["median"] * 1e3 for row in rows], "o", label=subject)
        for row, x in zip(rows, flops, strict=True):
            label = f"{row['routes']} x{row['batch']}"
            axes.annotate(
                label, (x, row["prefill"]["median"] * 1e3), fontsize=6, xytext=(3, 3), textcoords="offset points"
            )
    ends = sorted(row["computed_prefill_flops"] for row in latency["rows"])
    steps = [ends[0] * (ends[-1] / ends[0]) ** (i / 100) for i in range(101)]
    axes.plot([x / 1e12 for x in steps], [least_seconds(latency, x) * 1e3 for x in steps], "k--", label="limit")
    axes.set(
        xscale="log", yscale="log", xlabel="TFLOP of the prefill", ylabel="ms", title=f"{latency['shape']}: prefill"
    )
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    measured = sorted(RESULTS.glob("llava-*-cuda.json")) or [RESULTS / "llava-1.5-7b-cuda.json"]
    parser.add_argument("--latency", type=Path, nargs="+", default=measured)
    parser.add_argument("--ops", type=Path, default=RESULTS / "ops-cuda.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args(arguments)
    for file in (*options.latency, options.ops):
        if not file.is_file():
            parser.error(f"{file} is not there: `make gpu-bench` writes it")
    *models, kernels = (json.loads(file.read_bytes()) for file in (*options.latency, options.ops))
    for latency in models:
        plot(latency, options.docs / plot_name(latency))
    document = options.docs / "performance.md"
    text = document.read_text(encoding="utf-8")
    document.write_text(with_section(text, section(models, kernels)), encoding="utf-8")
    print(f"{document} is written, and beside it {', '.join(map(plot_name, models))}")


if __name__ == "__main__":
    main()
