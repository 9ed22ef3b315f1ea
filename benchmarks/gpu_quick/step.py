"""One step in a process of its own: python -m benchmarks.gpu_quick.step NAME SETTINGS FILE FOLDER SECONDS."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_quick.record import NotHereError, Recorder
from benchmarks.gpu_quick.settings import Settings


def main(arguments: Sequence[str]) -> int:
    """Exit status 0; 1 where a part of the step failed."""
    name, settings, file, folder, seconds = arguments
    record = Recorder(Path(file), Path(folder), float(seconds))
    try:
        importlib.import_module(f"benchmarks.gpu_quick.{name}").run(Settings.from_json(settings), record)
    except NotHereError as error:
        record.put(not_here=str(error))
    return 1 if record.failed_parts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
