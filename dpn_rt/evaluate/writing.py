"""Files that a command makes as a whole."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from dpn_rt.errors import EvaluationError


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file, or leaves what was there; its directory is made.

    Raises:
        EvaluationError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():  # a file would take the place of a device
            raise OSError(0, "not a regular file")
        partial.write_bytes(data)
        partial.replace(target)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise EvaluationError(f"{path}: cannot be written: {error.strerror}") from error


def check_target(path: Path) -> None:
    """Refuses a file that could not be written, before anything is computed for it.

    Raises:
        EvaluationError: with the reason.
    """
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if (path.exists() and not path.is_file()) or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise EvaluationError(
            f"{path}: cannot be written there: expected a regular file in a directory that can be written to"
        )
