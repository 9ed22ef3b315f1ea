"""A subject in a process of its own, with a Python of its own: packages of peers pin versions that ours do not."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.comparison.subjects import Request, Timing

WORKERS = Path(__file__).parent


class Remote:
    """A peer's model. It takes the numbers of rows of the requests, and makes rows of its own."""

    def __init__(self, python: Path, worker: str, *arguments: object) -> None:
        """Starts the worker, which tries its settings, and waits for it."""
        command = [str(python), str(WORKERS / worker), *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        weakref.finalize(self, self._process.terminate)
        self.settings = self._read()
        """The peer's settings that were tried, with their seconds, and those that are used."""

    def run(self, requests: Sequence[Request], steps: int) -> Timing:
        """See `Subject`."""
        assert self._process.stdin is not None
        rows = len(requests[0].token_ids) - 1 + len(requests[0].image_embeds)
        print(json.dumps({"batch": len(requests), "rows": rows, "steps": steps}), file=self._process.stdin, flush=True)
        times = self._read()
        return Timing(times["vision"], times["prefill"], times["decode_step"], None, times["kv_rows"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(map(str, self._process.args))} ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found
