"""Watches a server from a separate process, so that a busy load generator does not look like a slow server.

`python -m benchmarks.load.watch URL PID` reads lines. At each first one it polls /health and the memory of the process
with its children, prints a line, and goes on polling until the next line; then it prints what it saw as JSON. Each poll
has a connection of its own, as a supervisor's has.
"""

from __future__ import annotations

import http.client
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import psutil

ROOT = Path(__file__).resolve().parents[2]
INTERVAL = 0.05
TIMEOUT = 60


class Watch:
    """A process that watches one server."""

    def __init__(self, watch: subprocess.Popen[str]) -> None:
        assert watch.stdin is not None and watch.stdout is not None
        self._input: IO[str] = watch.stdin
        self._output: IO[str] = watch.stdout

    @contextmanager
    def watching(self) -> Iterator[dict[str, list[Any]]]:
        """Watches within the block, from a first poll before it to a last one after it.

        Yields:
            Empty until the end of the block: then `health_seconds`, `statuses` and `memory_bytes` of each poll.
        """
        seen: dict[str, list[Any]] = {}
        self._next()
        yield seen
        seen |= json.loads(self._next())

    def _next(self) -> str:
        self._input.write("\n")
        self._input.flush()
        return self._output.readline()


@contextmanager
def watch(url: str, pid: int) -> Iterator[Watch]:
    """Starts to watch the server at `url`, whose process is `pid`."""
    command = [sys.executable, "-m", "benchmarks.load.watch", url, str(pid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        yield Watch(process)
        process.communicate()


def main() -> None:
    url, pid = sys.argv[1:]
    process, address = psutil.Process(int(pid)), urlsplit(url)
    processes = [process, *process.children(recursive=True)]
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    while lines.get():
        polls = [poll(address.hostname or "", address.port, processes)]
        print("watching", flush=True)
        while has_no_line(lines):
            polls.append(poll(address.hostname or "", address.port, processes))
        polls.append(poll(address.hostname or "", address.port, processes))
        seconds, statuses, memory = zip(*polls, strict=True)
        print(json.dumps({"health_seconds": seconds, "statuses": statuses, "memory_bytes": memory}), flush=True)


def poll(host: str, port: int | None, processes: list[psutil.Process]) -> tuple[float, int, int]:
    """Seconds and status of /health, and bytes of memory."""
    started = time.perf_counter()
    status = health(host, port)
    return time.perf_counter() - started, status, sum(each.memory_info().rss for each in processes)


def has_no_line(lines: queue.SimpleQueue[str]) -> bool:
    """Whether none comes for a moment."""
    try:
        lines.get(timeout=INTERVAL)
    except queue.Empty:
        return True
    return False


def health(host: str, port: int | None) -> int:
    """The status of /health; 599 without a reply."""
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    try:
        connection.request("GET", "/health")
        reply = connection.getresponse()
        reply.read()
        return reply.status
    except (OSError, http.client.HTTPException):
        return 599
    finally:
        connection.close()


if __name__ == "__main__":
    main()
