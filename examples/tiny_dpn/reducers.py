"""Does reduction pay? Accuracy against FLOPs of training-free reductions, of a DPN, and of static pooling.

python -m examples.tiny_dpn.reducers --output docs/reducers \\
  --dense examples/tiny_dpn/dense_checkpoint --dpn examples/tiny_dpn/checkpoint --static DIR
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpn_rt import LLM
from dpn_rt.builders.native import build_engine
from dpn_rt.errors import DpnError
from dpn_rt.evaluate.writing import write_whole
from dpn_rt.schema.dtypes import DType
from dpn_rt.terminal import escape_output
from examples.tiny_dpn.answers import ask_runtime
from examples.tiny_dpn.data import LEVELS, Sample, sample
from examples.tiny_dpn.metrics import Group, group
from examples.tiny_dpn.phase import TrainingError
from examples.tiny_dpn.plots import methods_against_flops
from examples.tiny_dpn.report import percent, table
from examples.tiny_dpn.train import check_writable

DTYPE: DType = "bfloat16"
SHARES = (0.75, 0.5, 0.25, 0.1, 0.05)
KERNELS = ("1x2", "2x2", "2x4", "4x4")
ROUTER_BIASES = (-8.0, 0.0, 8.0, 16.0, 32.0)
SWEEPS: dict[str, list[str]] = {
    "FastV, k=1": [f"fastv:k=1,ratio={1 - share:g}" for share in SHARES],
    "FastV, k=2": [f"fastv:k=2,ratio={1 - share:g}" for share in SHARES],
    "FastV, k=4": [f"fastv:k=4,ratio={1 - share:g}" for share in SHARES],
    "PyramidDrop": [f"pyramiddrop:layers=2-4-6,ratios={share:g}-{share / 2:g}-{share / 4:g}" for share in (1, *SHARES)],
    "random, from layer 2": [f"random:layer=2,keep={share:g}" for share in SHARES],
    "random, before the LLM": [f"random:layer=0,keep={share:g}" for share in SHARES],
    "DivPrune": [f"divprune:keep={share:g}" for share in SHARES],
    "pool, before the LLM": [f"pool:kernel={kernel},layer=0" for kernel in KERNELS],
    "pool, from layer 2": [f"pool:kernel={kernel},layer=2" for kernel in KERNELS],
}
"""Method -> SPECs, from mild to strong. The decoder has eight layers."""


@dataclass(frozen=True, slots=True)
class Point:
    """One method with one setting."""

    method: str
    setting: str
    """A SPEC, or the router bias."""
    overall: Group
    levels: dict[str, Group]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    escape_output()
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_dpn.reducers", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dense", type=Path, required=True, metavar="DIR", help="stock checkpoint")
    parser.add_argument("--dpn", type=Path, metavar="DIR", help="checkpoint with trained routers")
    parser.add_argument("--static", type=Path, metavar="DIR", help="checkpoint trained with 2x2 at every boundary")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for the table and the plot")
    parser.add_argument("--scenes", type=int, default=200, metavar="N", help="ten questions each (default 200)")
    options = parser.parse_args(given)
    started = time.perf_counter()
    try:
        check_writable(options.output)
        points = sweep(options.dense, options.dpn, options.static, [sample("test", i) for i in range(options.scenes)])
    except (DpnError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = {
        "command": shlex.join(["python", "-m", "examples.tiny_dpn.reducers", *given]),
        "dtype": DTYPE,
        "versions": {name: version(name) for name in ("dpn_rt", "torch")},
        "seconds": time.perf_counter() - started,
        "points": [asdict(point) for point in points],
    }
    write_whole(options.output / "sweep.json", (json.dumps(result, indent=1) + "\n").encode())
    write_whole(options.output / "sweep.md", markdown(points).encode())
    methods_against_flops(result["points"], options.output / "sweep.png")
    print(markdown(points))
    return 0


def sweep(dense: Path, dpn: Path | None, static: Path | None, samples: Sequence[Sample]) -> list[Point]:
    """Every method with every setting on the same questions."""
    specs = ["none", *(spec for each in SWEEPS.values() for spec in each)]
    with tempfile.TemporaryDirectory() as directory:

        def load(name: str, path: Path, **options: Any) -> LLM:
            return LLM(build_engine(path, Path(directory) / name, dtype=DTYPE).path, **options)

        points = list(_reductions(load("dense", dense, reduce=specs), samples))
        if dpn is not None:
            llm = load("dpn", dpn)
            points += [_ask(llm, samples, "DPN", f"router_bias={bias:g}", router_bias=bias) for bias in ROUTER_BIASES]
        if static is not None:
            points.append(_ask(load("static", static), samples, "static, trained", "2x2 at three boundaries"))
    return points


def _reductions(llm: LLM, samples: Sequence[Sample]) -> Iterator[Point]:
    yield _ask(llm, samples, "dense", "none", reduce="none")
    for method, specs in SWEEPS.items():
        for spec in specs:
            yield _ask(llm, samples, method, spec, reduce=spec)


def _ask(llm: LLM, samples: Sequence[Sample], method: str, setting: str, **options: Any) -> Point:
    answers = ask_runtime(llm, samples, f"{method} {setting}", **options)
    levels = {level: group([answer for answer in answers if answer.level == level]) for level in LEVELS}
    return Point(method, setting, group(answers), levels)


def markdown(points: Sequence[Point]) -> str:
    """One line a point."""
    header = ["method", "setting", "FLOPs / dense", "right", *LEVELS, "visual tokens, last stage"]
    rows = [
        [
            point.method,
            f"`{point.setting}`",
            f"{point.overall.flops_ratio:.3f}",
            percent(point.overall.accuracy),
            *(percent(point.levels[level].accuracy) for level in LEVELS),
            f"{point.overall.visual_tokens[-1]:.1f}",
        ]
        for point in points
    ]
    return table(header, rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
