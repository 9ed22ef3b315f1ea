"""Runs steps one after the other, each in a process of its own and within its time.

A step may take what the steps before it have left of theirs, and nothing of the time of those after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_quick.settings import Settings
from benchmarks.gpu_quick.steps import Step

ROOT = Path(__file__).resolve().parents[2]
LEAST_SECONDS = 5
"""A step does not begin with less time."""
SHOWN_LINES = 15
"""Of the log of a step that failed."""
SECONDS_TO_END = 3
"""A step that is stopped ends its own groups of processes meanwhile."""

DONE, FAILED, STOPPED, NOT_HERE, NOT_RUN = "done", "failed", "stopped", "not here", "not run"


@dataclass
class Outcome:
    """What became of a step."""

    step: str
    state: str
    seconds: float = 0.0
    limit: float = 0.0
    """Seconds that it had."""
    why: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    @property
    def is_bad(self) -> bool:
        return self.state in (FAILED, STOPPED, NOT_RUN)


class Run:
    """A run of the steps and its files: `gpu-quick.json` with all values and `gpu-quick.log` with all output."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        total_seconds: float,
        say: Callable[[str], None],
        program: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu_quick.step"),
    ) -> None:
        """
        Args:
            settings: of all steps.
            folder: for the files.
            total_seconds: for all steps together.
            say: prints a line.
            program: runs a step, see `step.py`.
        """
        self._settings, self.folder, self._say, self._program = settings, folder, say, program
        self._end = time.monotonic() + total_seconds
        self._spare = 0.0  # what the steps so far have left of their seconds
        self.outcomes: list[Outcome] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "gpu-quick.log"
        self._log.write_bytes(b"")

    def steps(self, steps: Sequence[Step]) -> list[Outcome]:
        """Run them all; the files are complete after each."""
        for step in steps:
            outcome = self._step(step, step.seconds + self._spare)
            self._spare = max(0.0, self._spare + step.seconds - outcome.seconds)
            self.outcomes.append(outcome)
            self._save()
            why = f": {outcome.why}" if outcome.why else ""
            self._say(f"== {step.name}: {outcome.state} after {outcome.seconds:.0f} of {outcome.limit:.0f} s{why}")
            for line in outcome.lines:
                self._say(f"   {line}")
            if outcome.state in (FAILED, STOPPED):
                for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]:
                    self._say(f"   | {line[:200]}")
        return self.outcomes

    def _step(self, step: Step, most_seconds: float) -> Outcome:
        left = self._end - time.monotonic()
        limit = min(most_seconds, left)
        if left < LEAST_SECONDS:
            return Outcome(step.name, NOT_RUN, why="no time is left")
        if step.needs_kernels and any(each.step == "build" and each.state != DONE for each in self.outcomes):
            return Outcome(step.name, NOT_RUN, why="it needs the kernels, whose build failed")
        with tempfile.TemporaryDirectory(prefix="gpu-quick-") as folder:
            file = Path(folder) / "step.json"
            start = time.monotonic()
            status = self._process(step.name, file, limit)
            seconds = time.monotonic() - start
            found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"values": {}, "lines": []}
        outcome = Outcome(step.name, DONE, seconds, limit, values=found["values"], lines=found["lines"])
        if status is None:
            outcome.state, outcome.why = STOPPED, f"it took longer than {limit:.0f} s"
        elif status != 0:
            outcome.state, outcome.why = FAILED, f"exit status {status}"
        elif "not_here" in found["values"]:
            outcome.state, outcome.why = NOT_HERE, found["values"]["not_here"]
        return outcome

    def _process(self, name: str, file: Path, seconds: float) -> int | None:
        """The exit status of a step's process; None where it was stopped. Its children end with it."""
        command = [*self._program, name, self._settings.to_json(), str(file), str(self.folder), str(seconds)]
        with self._log.open("ab") as log:
            log.write(f"\n== {name}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, start_new_session=True
            )
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.terminate()
                    process.wait(SECONDS_TO_END)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _save(self) -> None:
        result = {"settings": asdict(self._settings), "steps": [asdict(outcome) for outcome in self.outcomes]}
        (self.folder / "gpu-quick.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
