"""What a step has found: saved after every entry, so that a step that is stopped has told what came before."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class NotHereError(Exception):
    """The machine lacks what a step needs; the message says what."""


class Recorder:
    """Values and short lines of one step."""

    def __init__(self, file: Path, folder: Path, seconds: float = 3600.0) -> None:
        """
        Args:
            file: for the values and lines.
            folder: of the run, for what a step saves beside them.
            seconds: that the step has.
        """
        self._file, self.folder, self._end = file, folder, time.monotonic() + seconds
        self.values: dict[str, Any] = {}
        self.lines: list[str] = []
        self._save()

    def put(self, **values: Any) -> None:
        """Add values, which become JSON."""
        self.values.update(values)
        self._save()

    def say(self, line: str) -> None:
        """Add a line for people, and print it."""
        print(line, flush=True)
        self.lines.append(line)
        self._save()

    def attempt(self, name: str, work: Callable[[], object]) -> None:
        """Run one part of a step; its error is noted, and the parts after it still run."""
        try:
            work()
        except Exception as error:  # any part may fail in its own way on a machine that nobody has seen
            self.put(**{f"{name}_error": f"{type(error).__name__}: {error}"[:2000]})
            self.say(f"{name} FAILED: {type(error).__name__}: {first_line(error)}")

    @property
    def seconds_left(self) -> float:
        """Until the step is stopped."""
        return self._end - time.monotonic()

    @property
    def failed_parts(self) -> list[str]:
        return [name.removesuffix("_error") for name in self.values if name.endswith("_error")]

    def _save(self) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps({"values": self.values, "lines": self.lines}), encoding="utf-8")
        new.replace(self._file)


def first_line(error: BaseException) -> str:
    """Of an error's message, cut to the width of a terminal or two."""
    return (str(error).strip().splitlines() or [""])[0][:200]
