"""`python -m dpn_rt.serve` as a process of its own, with or without waiting for its imports."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, Protocol

import httpx

from dpn_rt.server.engine_client import process as engine_process

SERVE = "dpn_rt.serve"
IMPORTS = [
    "dpn_rt.server.app", "dpn_rt.server.engine_client.process", "dpn_rt.server.engine_client.worker",
    "transformers.image_processing_backends",
]  # fmt: skip
"""What takes seconds of a server's start, and of its engine's process."""


class Server(Protocol):
    """A process, as `subprocess.Popen` has it."""

    pid: int

    def send_signal(self, number: int) -> None: ...
    def kill(self) -> None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


class Forked:
    """A command in a process that was forked where its imports are made already."""

    def __init__(self, options: list[str], stderr: int, start_new_session: bool = False) -> None:
        """
        Args:
            options: of the command.
            stderr: a descriptor.
            start_new_session: as of `subprocess.Popen`.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        # The descriptor is passed while the process starts.
        self._process = context.Process(target=_run, args=(options, _Descriptor(stderr), start_new_session))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(SERVE, timeout or 0)
        return self._process.exitcode


class ForkedModule:
    """What `start_module` starts, as a child of this process that has its imports. Other tests start the real one."""

    def __init__(self, module: str, connection: int) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        try:
            os.setpgid(0, 0)
            os.closerange(3, connection)
            os.closerange(connection + 1, os.sysconf("SC_OPEN_MAX"))
            sys.argv = [module, str(connection)]
            importlib.import_module(module).main()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """As of `subprocess.Popen`. It stays as it is when it has ended, so that several threads may wait."""
        end = None if timeout is None else time.monotonic() + timeout
        how = os.WEXITED | os.WNOWAIT | (0 if end is None else os.WNOHANG)
        while (found := os.waitid(os.P_PID, self.pid, how)) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(0.005)
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


class _Descriptor:
    """A descriptor as an argument of a process."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self._number),)


def _received(descriptor: Any) -> int:
    number: int = descriptor.detach()
    return number


def _run(options: list[str], stderr: int, start_new_session: bool) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as where the tests do not run under nohup
    if start_new_session:
        os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.dup2(stderr, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    engine_process.start_module = ForkedModule  # type: ignore[assignment]
    sys.argv = [SERVE, *options]
    runpy.run_module(SERVE, run_name="__main__", alter_sys=True)


@contextmanager
def serving(
    engine_dir: Path, *options: str, start_new_session: bool = False, imports_anew: bool = False
) -> Iterator[tuple[Server, str, list[str]]]:
    """A running server, its URL and the lines of its log.

    Args:
        engine_dir: what it serves.
        options: more of the command line.
        start_new_session: signals of the terminal go to it and not to the tests.
        imports_anew: started as a user does, which takes seconds longer.
    """
    options = ("--engine", str(engine_dir), "--port", "0", *options)
    reading, writing = os.pipe()
    process: Server
    if imports_anew:
        command = [sys.executable, "-m", SERVE, *options]
        process = subprocess.Popen(command, stderr=writing, start_new_session=start_new_session)
    else:
        process = Forked(list(options), writing, start_new_session)
    os.close(writing)
    lines: list[str] = []
    stderr = os.fdopen(reading, encoding="utf-8")
    try:
        url = ""
        for line in stderr:
            lines.append(line)
            if found := re.search(r"running on (https?://\S+)", line):
                url = found[1]
                break
        assert url, "".join(lines)
        threading.Thread(target=lambda: lines.extend(stderr), daemon=True).start()
        yield process, url, lines
    finally:
        process.kill()
        process.wait()


def post(url: str, body: dict[str, Any], **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, **options)
