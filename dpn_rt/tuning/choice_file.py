"""A file in the user's cache directory that keeps what was measured, by machine. Whatever is wrong with it, it is as if
it were empty."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path

from dpn_rt.errors import ConfigError
from dpn_rt.schema.files import SETTINGS_BYTES
from dpn_rt.schema.json_text import read_json

CPU_INFO = Path("/proc/cpuinfo")


def default_path() -> Path | None:
    """In `$XDG_CACHE_HOME`, or `~/.cache`; None: there is no such directory."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "dpn_rt" / "cpu_choices.json"


def processor_model() -> str:
    """As the processor calls itself."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def read(path: Path | None, machine: str) -> dict[str, object] | None:
    """What is known about a machine; None: nothing."""
    values = _read_all(path).get(machine)
    return values if isinstance(values, dict) else None


def add(path: Path | None, machine: str, values: dict[str, object]) -> dict[str, object]:
    """Write what was measured, unless another process has written something about this machine meanwhile.

    The file is replaced as a whole, so that readers never see a part of it. Two processes that write at the same moment
    keep one of the two; the other one's machine is measured again some day.

    Returns:
        What is known about the machine now.
    """
    if path is None:
        return values
    known = _read_all(path)
    theirs = known.get(machine)
    if isinstance(theirs, dict):
        return theirs
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({**known, machine: values}, file, indent=1, sort_keys=True)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError:
        pass
    return values


def _read_all(path: Path | None) -> dict[str, object]:
    try:
        found = read_json(path, ConfigError, SETTINGS_BYTES) if path is not None else {}
    except ConfigError:
        return {}
    return found if isinstance(found, dict) else {}
