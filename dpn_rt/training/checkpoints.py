"""Trainer's checkpoints of a training, and which of them can be gone on from."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS, _STATE = "model.safetensors", "trainer_state.json"
_PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def last_checkpoint(work: Path, note: Callable[[str], None] = lambda line: None) -> Path | None:
    """The last checkpoint that is whole: one is written file by file, and a killed training leaves a part of it.

    Args:
        work: directory of the checkpoints; it need not exist.
        note: takes a line for each checkpoint that is left out.

    Returns:
        None where there is none.
    """
    if not work.is_dir():
        return None
    found = [(int(match[1]), path) for path in work.iterdir() if (match := _NAME.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        fault = _fault(path)
        if fault is None:
            return path
        note(f"{path} is left out: {fault} is missing or damaged, as a training leaves it that was killed")
    return None


def _fault(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that is missing or damaged; Trainer would begin the optimiser anew without its."""
    try:
        with safe_open(checkpoint / _WEIGHTS, "pt"):
            pass
    except (OSError, SafetensorError):
        return _WEIGHTS
    for name in _PICKLES:
        if not zipfile.is_zipfile(checkpoint / name):
            return name
    try:
        json.loads((checkpoint / _STATE).read_bytes())
    except (OSError, ValueError):
        return _STATE
    return None
