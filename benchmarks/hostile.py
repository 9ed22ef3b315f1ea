"""Hostile clients of every kind against a running server, one kind after the other.

python -m benchmarks.hostile --engine DIR --seconds 5 --json benchmarks/results/hostile-tiny.json

For each kind some clients attack for a few seconds while others ask /health and good questions. The table says how
often it was tried and refused, whether the server was still right, the slowest /health, and its processes' memory.
Some kinds are also sent once to a server that does nothing else (`hostile_alone.py`).
Fails (exit status 1) if a good question was not answered as `LLM` answers it, or if there was a server error.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np

from benchmarks.hostile_alone import ALONE, measure_kinds
from benchmarks.load.attacks import ATTACKS, Target
from benchmarks.load.http_questions import Question, questions
from benchmarks.load.server_process import serving
from benchmarks.load.watch import Watch, watch
from benchmarks.measuring.machine import machine
from benchmarks.measuring.result_file import write_json
from dpn_rt.terminal import escape_output

Good = list[tuple[Question, str]]
"""Questions with the answers of `LLM`."""


@dataclass(frozen=True)
class Row:
    """What one kind of attack did."""

    kind: str
    outcomes: dict[str, int]
    """How often each status came, or that the connection was closed, or left by the client."""
    good: int
    """Good questions that were answered as they should be, meanwhile and afterwards."""
    wrong: int
    health_p99_ms: float
    health_worst_ms: float
    health_failed: int
    peak_mb: int

    @property
    def tried(self) -> int:
        return sum(self.outcomes.values())

    @property
    def refused(self) -> int:
        return sum(count for outcome, count in self.outcomes.items() if outcome.startswith("4") or outcome == "closed")

    @property
    def survived(self) -> bool:
        """Whether everyone else was served, and no attack found a defect."""
        errors = sum(count for outcome, count in self.outcomes.items() if outcome in ("500", "502"))
        return not self.wrong and not self.health_failed and not errors and self.good > 0


def attack(url: str, watcher: Watch, kind: str, model: str, good: Good, seconds: float, clients: int) -> Row:
    """Attacks for some seconds, and at least once."""
    address = urlsplit(url)
    target, send = Target(address.hostname or "", address.port or 0, model), ATTACKS[kind]()
    outcomes: Counter[str] = Counter()
    right: Counter[bool] = Counter()
    end = time.monotonic() + seconds

    def hostile() -> None:
        while True:
            outcomes[send(target)] += 1
            if time.monotonic() > end:
                return

    def friendly() -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            number = 0
            while not (number and time.monotonic() > end):
                question, expected = good[number % len(good)]
                reply = client.post("/v1/chat/completions", json=question.body(model))
                if reply.status_code == 429:
                    time.sleep(0.2)
                    continue
                number += 1
                right[reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"] == expected] += 1

    with watcher.watching() as seen:
        threads = [threading.Thread(target=hostile) for _ in range(clients)] + [threading.Thread(target=friendly)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    health = 1000 * np.array(seen["health_seconds"])
    return Row(
        kind,
        dict(outcomes),
        right[True],
        right[False],
        round(float(np.percentile(health, 99)), 1),
        round(float(health.max()), 1),
        sum(status != 200 for status in seen["statuses"]),
        max(seen["memory_bytes"]) >> 20,
    )


def hostile(engine: Path, kinds: Iterable[str], seconds: float, clients: int) -> list[Row]:
    """Attacks of these kinds against a server of its own."""
    good = questions(engine, scenes=2)
    rows = []
    with serving(engine) as (url, pid), watch(url, pid) as watcher:
        for kind in kinds:
            rows.append(attack(url, watcher, kind, engine.resolve().name, good, seconds, clients))
            print(line(rows[-1]), flush=True)
    return rows


TITLE = (
    f"{'kind':36} {'tried':>6} {'refused':>7} {'survived':>8} {'good':>5} {'p99 ms':>7} {'worst ms':>8} {'peak MB':>7}"
)


def line(row: Row) -> str:
    """A row of the table."""
    return (
        f"{row.kind:36} {row.tried:6d} {row.refused:7d} {'yes' if row.survived else 'NO':>8} {row.good:5d} "
        f"{row.health_p99_ms:7.1f} {row.health_worst_ms:8.1f} {row.peak_mb:7d}  {row.outcomes}"
    )


def main() -> int:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each kind")
    parser.add_argument("--clients", type=int, default=4, help="that attack")
    parser.add_argument("--kinds", nargs="+", default=list(ATTACKS), choices=list(ATTACKS), metavar="KIND")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    print(TITLE)
    rows = hostile(options.engine, options.kinds, options.seconds, options.clients)
    print("\nalone on a server:")
    alone = measure_kinds(options.engine, [kind for kind in options.kinds if kind in ALONE])
    if options.json:
        result = {
            "machine": machine("cpu"),
            "seconds": options.seconds,
            "clients": options.clients,
            "rows": [asdict(row) for row in rows],
            "alone": [asdict(each) for each in alone],
        }
        write_json(options.json, result)
    return 0 if all(row.survived for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
