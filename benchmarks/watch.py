"""Watches a server from a separate process, so that a busy load generator does not look like a slow server.

`python -m benchmarks.watch URL PID` polls /health and the memory of the process with its children until its input
closes, then prints JSON. Each poll has a connection of its own, as a supervisor's has.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from urllib.parse import urlsplit

import psutil

INTERVAL = 0.05
TIMEOUT = 60


def main() -> None:
    url, pid = sys.argv[1:]
    process, address = psutil.Process(int(pid)), urlsplit(url)
    processes = [process, *process.children(recursive=True)]
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    seconds: list[float] = []
    statuses: list[int] = []
    memory: list[int] = []
    while not stop.wait(INTERVAL):
        started = time.perf_counter()
        statuses.append(health(address.hostname or "", address.port))
        seconds.append(time.perf_counter() - started)
        memory.append(sum(each.memory_info().rss for each in processes))
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
