"""Seconds from `kill -9` to the next answer, where a supervisor restarts the server immediately.

python -m benchmarks.restart --engine DIR --repeats 5

The server is killed while it answers. The engine's files must be the same before and after, and the first answer of
the new server must be that of the old one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import httpx

from benchmarks.load.http_questions import Question
from benchmarks.load.server_process import serving
from dpn_rt.terminal import escape_output
from examples.tiny_dpn import data


def digest(folder: Path) -> str:
    """One sha256 of all files in a folder."""
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return content.hexdigest()


def ask(url: str, body: dict[str, object]) -> str:
    """Ask the server; return the text of its answer."""
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    reply.raise_for_status()
    return str(reply.json()["choices"][0]["message"]["content"])


def measure(engine: Path, repeats: int) -> dict[str, object]:
    """Seconds of each restart, and whether anything differed."""
    name = engine.resolve().name
    sample = data.sample("test", 0)
    body = Question(sample.image, sample.questions[0].text).body(name)
    long_body = {**body, "max_tokens": 400, "ignore_eos": True}
    files = digest(engine)
    seconds: list[float] = []
    expected: str | None = None
    for _ in range(repeats):
        with serving(engine) as (url, pid):
            expected = expected or ask(url, body)
            with ThreadPoolExecutor(4) as pool:
                running = [pool.submit(ask, url, long_body) for _ in range(4)]
                time.sleep(0.2)
                os.kill(pid, signal.SIGKILL)
                killed = time.perf_counter()
                broken = sum(future.exception() is not None for future in running)
        with serving(engine) as (url, _):
            answer = ask(url, body)
            seconds.append(time.perf_counter() - killed)
        if broken != len(running) or answer != expected or digest(engine) != files:
            raise RuntimeError(f"{broken} of 4 requests were cut; answered {answer!r}, expected {expected!r}")
    return {"seconds": {"median": median(seconds), "min": min(seconds), "max": max(seconds)}, "repeats": repeats}


def main() -> int:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(json.dumps(measure(options.engine, options.repeats), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
