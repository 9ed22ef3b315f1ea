"""Watches a server from a separate process, so that a busy load generator does not look like a slow server.

`python -m benchmarks.watch URL PID` polls /health and the memory of the process with its children until its input
closes, then prints JSON. It prints a line before, once it has polled. Each poll has a connection of its own, as a
supervisor's has.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

ROOT = Path(__file__).resolve().parent.parent
INTERVAL = 0.05
TIMEOUT = 60
STARTED = "started"


@contextmanager
def watching(url: str, pid: int) -> Iterator[dict[str, list[Any]]]:
    """Watches within the block, from a first poll before it to a last one after it.

    Yields:
        Empty until the end of the block: then `health_seconds`, `statuses` and `memory_bytes` of each poll.
    """
    command = [sys.executable, "-m", "benchmarks.watch", url, str(pid)]
    seen: dict[str, list[Any]] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as watch:
        assert watch.stdout is not None and watch.stdout.readline().strip() == STARTED
        yield seen
        seen |= json.loads(watch.communicate("")[0])


def main() -> None:
    url, pid = sys.argv[1:]
    process, address = psutil.Process(int(pid)), urlsplit(url)
    processes = [process, *process.children(recursive=True)]
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    seconds: list[float] = []
    statuses: list[int] = []
    memory: list[int] = []
    is_over = False
    while not is_over:
        is_over = bool(seconds) and stop.wait(INTERVAL)  # the last poll begins after the end
        started = time.perf_counter()
        statuses.append(health(address.hostname or "", address.port))
        seconds.append(time.perf_counter() - started)
        memory.append(sum(each.memory_info().rss for each in processes))
        if len(seconds) == 1:
            print(STARTED, flush=True)
    print(json.dumps({"health_seconds": seconds, "statuses": statuses, "memory_bytes": memory}))


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
