"""A server whose standard error takes nothing starts, answers and ends like any other."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.server.command import Forked, Server
from tests.server.conftest import Ask
from tests.skips import NOT_LINUX

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason=NOT_LINUX)


@contextmanager
def standard_error(kind: str) -> Iterator[int]:
    """A file that takes nothing, as a descriptor."""
    if kind == "a full disk":
        with Path("/dev/full").open("wb") as disk:
            yield disk.fileno()
        return
    reading, writing = os.pipe()
    try:
        if kind == "a pipe without a reader":
            os.close(reading)
        else:
            os.write(writing, bytes(fcntl.fcntl(writing, fcntl.F_GETPIPE_SZ)))
        yield writing
    finally:
        os.close(writing)
        if kind == "a full pipe":
            os.close(reading)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_up(process: Server, url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=10).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise AssertionError(f"it does not start, status {process.poll()}")


def started(kind: str, options: list[str], stderr: int) -> Server:
    """A server; an interpreter that starts without a standard error gives its number to another file."""
    if kind != "closed":
        return Forked(options, stderr)
    command = ["bash", "-c", 'exec "$0" -m dpn_rt.serve "$@" 2>&-', sys.executable, *options]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("kind", ["a full pipe", "a pipe without a reader", "a full disk", "closed"])
def test_a_server_without_standard_error(kind: str, engine_dir: Path) -> None:
    port = free_port()
    options = ["--engine", str(engine_dir), "--port", str(port), "--log-level", "debug"]
    with standard_error("a full disk" if kind == "closed" else kind) as stderr:
        process = started(kind, options, stderr)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_up(process, url)
            reply = httpx.post(f"{url}/v1/chat/completions", json=Ask().body(model=engine_dir.name), timeout=60)
            assert reply.status_code == 200, reply.text
            assert httpx.post(f"{url}/v1/completions", json={"prompt": []}, timeout=60).status_code == 400
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
