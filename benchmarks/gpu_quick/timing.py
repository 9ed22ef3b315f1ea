"""The time of one call whose inputs are not in the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from benchmarks.measuring.clock import Run, replayable, seconds

ROUNDS = 7
MOST_COPIES = 16


def copies_of(num_bytes: int, cold_bytes: int) -> int:
    """How many sets of inputs of `num_bytes` together are `cold_bytes` or more; at least 2."""
    return max(2, min(MOST_COPIES, -(-cold_bytes // max(1, num_bytes))))


def cold_seconds(calls: Sequence[Run], device: str) -> float:
    """Median time of a call; each of `calls` does the same with other inputs. On a GPU they are replayed as a graph."""

    def run_all() -> None:
        for call in calls:
            call()

    run = replayable(run_all, device)
    run()
    return statistics.median(seconds(run, device) for _ in range(ROUNDS)) / len(calls)


def told(work: Callable[[], float]) -> float | str:
    """A time, or why there is none."""
    try:
        return work()
    except Exception as error:  # a library that does not take these inputs, in its own way
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]


def shown(value: float | str | None) -> str:
    """Microseconds, or the begin of the reason why there are none."""
    return "-" if value is None else value[:24] if isinstance(value, str) else f"{value * 1e6:.1f}"
