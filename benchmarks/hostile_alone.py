"""One hostile body on a server that does nothing else: how long it takes, and how much memory.

python -m benchmarks.hostile_alone --engine DIR

Fails (exit status 1) if a body of these kinds takes a second or more, or 300 MB beside the body's own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from benchmarks.load.attacks import ATTACKS, Target
from benchmarks.load.server_process import serving
from benchmarks.measuring.machine import machine
from benchmarks.measuring.memory import peak_memory
from benchmarks.measuring.result_file import write_json
from dpn_rt.terminal import escape_output

ALONE = (
    "10 million empty prompts",
    "15 million lists in lists",
    "a million lists",
    "500,000 unknown keys",
    "8 million ids",
    "30 MB of text",
    "10 MB of text outside ASCII",
    "PNG of a million chunks",
    "a URL of 20 million escapes",
)
"""Kinds whose bodies are large."""
WARM_UP = "JPEG 2000"
MOST_SECONDS, MOST_MB = 1.0, 300


@dataclass(frozen=True)
class Alone:
    """What one body did."""

    kind: str
    outcome: str
    """The status of its reply."""
    seconds: float
    """Until the reply, with the time that sending takes."""
    extra_mb: int | None
    """Of both processes of the server at their peak; None where the system does not report it."""

    @property
    def is_bounded(self) -> bool:
        return self.seconds < MOST_SECONDS and (self.extra_mb or 0) < MOST_MB


def measure_alone(engine: Path, kind: str) -> Alone:
    """Sends one body of a kind to a server of its own."""
    send = ATTACKS[kind]()
    with serving(engine) as (url, pid):
        address = urlsplit(url)
        target = Target(address.hostname or "", address.port or 0, engine.resolve().name)
        ATTACKS[WARM_UP]()(target)
        processes = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        with peak_memory(processes) as memory:
            started = time.perf_counter()
            outcome = send(target)
            seconds = time.perf_counter() - started
    return Alone(kind, outcome, round(seconds, 3), None if memory.extra is None else memory.extra >> 20)


def measure_kinds(engine: Path, kinds: Iterable[str]) -> list[Alone]:
    """One after the other; prints a line for each."""
    rows = []
    for kind in kinds:
        row = measure_alone(engine, kind)
        extra = "     ?" if row.extra_mb is None else f"{row.extra_mb:+6d}"
        print(f"{kind:36} {row.outcome:>7} {row.seconds:6.2f} s {extra} MB", flush=True)
        rows.append(row)
    return rows


def main() -> int:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=list(ALONE), choices=list(ATTACKS), metavar="KIND")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = measure_kinds(options.engine, options.kinds)
    if options.json:
        write_json(options.json, {"machine": machine("cpu"), "alone": [asdict(row) for row in rows]})
    return 0 if all(row.is_bounded for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
