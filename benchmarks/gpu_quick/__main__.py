"""Everything that a GPU can tell in nine minutes: python -m benchmarks.gpu_quick --out DIR.

Builds the kernels, runs their tests, times a model of published size, and compares answers. Every step has a process
and a time of its own, so a step that fails or hangs costs the others nothing. `make gpu-quick OUT=DIR` calls it;
docs/cuda.md describes the steps. `--stand-in` does the same on the CPU with tiny sizes, without a build.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_quick.runner import Run
from benchmarks.gpu_quick.settings import GPU, STAND_IN
from benchmarks.gpu_quick.steps import STEPS, TOTAL_SECONDS
from dpn_rt.terminal import escape_output


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 where every step ran to its end."""
    escape_output()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_quick", description=__doc__.split("\n\n")[0])
    names = [step.name for step in STEPS]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for gpu-quick.json, .log and junit.xml")
    parser.add_argument("--stand-in", action="store_true", help="the CPU and tiny sizes, without a build")
    parser.add_argument("--steps", nargs="+", choices=names, default=names, help="only these")
    parser.add_argument("--seconds", type=int, default=TOTAL_SECONDS, help="for all steps (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.seconds < 1:
        parser.error("--seconds must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a step's process ends with this one
    run = Run(STAND_IN if options.stand_in else GPU, options.out.resolve(), options.seconds, say)
    outcomes = run.steps([step for step in STEPS if step.name in options.steps])
    say(" ".join(f"{outcome.step} {outcome.state} {outcome.seconds:.0f}s;" for outcome in outcomes))
    return 1 if any(outcome.is_bad for outcome in outcomes) else 0


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
