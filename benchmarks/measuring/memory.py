"""Resident memory of this process or others, and its peak within a block of code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
RESET_PEAK = "5"
"""Written to clear_refs: the peak starts again from what is resident now (Linux, proc(5))."""


@dataclass
class PeakMemory:
    """Peak bytes above those resident at the start; None where the system does not report them."""

    extra: int | None = None


def resident_bytes(key: str = "VmRSS", process: int | str = "self") -> int | None:
    """A line of /proc/PROCESS/status in bytes; None where there is no such file."""
    return _bytes_of(PROC / str(process) / "status", key)


def huge_page_bytes() -> int | None:
    """Bytes of this process that are in huge pages; None where the system does not report them."""
    return _bytes_of(PROC / "self" / "smaps_rollup", "AnonHugePages")


def _bytes_of(file: Path, key: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None


@contextlib.contextmanager
def peak_memory(processes: Sequence[int | str] = ("self",)) -> Iterator[PeakMemory]:
    """Measure how far the resident memory of each of some processes rises within the block; their sum counts."""
    result = PeakMemory()
    before: list[int | None] = []
    for process in processes:
        try:
            (PROC / str(process) / "clear_refs").write_text(RESET_PEAK)
            before.append(resident_bytes(process=process))
        except OSError:
            before.append(None)
    yield result
    after = [resident_bytes("VmHWM", process) for process in processes]
    rises = [max(b - a, 0) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    result.extra = sum(rises) if len(rises) == len(processes) else None
