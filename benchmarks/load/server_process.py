"""A server of the product in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(engine: Path, *options: str) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its URL and process id."""
    command = [sys.executable, "-m", "dpn_rt.serve", "--engine", str(engine), "--port", "0", "--log-level", "info"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"running on (http://\S+)", line):
                    break
            else:
                raise RuntimeError("the server did not start")
            with subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL) as drain:
                try:
                    yield found[1], process.pid
                finally:
                    process.terminate()
                    process.wait(60)
                    drain.wait(10)
        finally:
            process.kill()
