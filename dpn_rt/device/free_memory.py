"""How much of the host's memory can still be taken."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

SYSTEM = Path("/")
"""Where `proc` and `sys` are."""


def free_memory(system: Path = SYSTEM) -> int:
    """Bytes that this process can allocate without swapping: of the machine, and of its containers.

    Containers limit memory by control groups, of version 1 or 2. A page of a file that is in memory counts as free.
    """
    return max(0, min([_of_machine(system), *_of_groups(system)]))


def _of_machine(system: Path) -> int:
    for name, value in _pairs(system / "proc/meminfo"):
        if name == "MemAvailable:":
            return value * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _of_groups(system: Path) -> Iterator[int]:
    """Of each control group of this process that has a limit. Below what a container sees, paths do not exist."""
    for line in _read(system / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "none", "")[:3]
        if not controllers:
            for limit in ("memory.max", "memory.high"):  # beyond the second one it is slowed down
                yield from _below(system / "sys/fs/cgroup", path, limit, "memory.current", "")
        elif "memory" in controllers.split(","):
            files = "memory.limit_in_bytes", "memory.usage_in_bytes"
            yield from _below(system / "sys/fs/cgroup/memory", path, *files, "total_")


def _below(root: Path, path: str, limit_file: str, used_file: str, prefix: str) -> Iterator[int]:
    """Free bytes of the group at `path`, and of those that it is part of."""
    group = PurePosixPath(path.lstrip("/"))
    for part in (group, *group.parents):
        folder = root / part
        limit, used = _number(folder / limit_file), _number(folder / used_file)
        if limit is None or used is None:
            continue
        of_files = {f"{prefix}active_file", f"{prefix}inactive_file"}
        yield limit - used + sum(value for name, value in _pairs(folder / "memory.stat") if name in of_files)


def _number(file: Path) -> int | None:
    text = _read(file).strip()
    return int(text) if text.isdecimal() else None  # "max" is no limit


def _pairs(file: Path) -> Iterator[tuple[str, int]]:
    for line in _read(file).splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdecimal():
            yield words[0], int(words[1])


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
