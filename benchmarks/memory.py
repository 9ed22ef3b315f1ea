"""Resident memory of this process, and its peak within a block of code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Written to clear_refs: the peak starts again from what is resident now (Linux, proc(5))."""


@dataclass
class PeakMemory:
    """Peak bytes above those resident at the start; None where the system does not report them."""

    extra: int | None = None


def resident_bytes(key: str = "VmRSS") -> int | None:
    """A line of /proc/self/status in bytes; None where there is no such file."""
    with contextlib.suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None


@contextlib.contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure how far resident memory rises within the block."""
    result = PeakMemory()
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
        before = resident_bytes()
    except OSError:
        before = None
    yield result
    after = resident_bytes("VmHWM")
    if before is not None and after is not None:
        result.extra = max(after - before, 0)
