"""Chat templates are rendered in a process of their own, which is ended where one takes too much time or memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpn_rt.errors import EngineError, RequestError

SECONDS = 0.5
"""Of processor time for one rendering. Those of published checkpoints take less than a hundredth of it."""
MEMORY_BYTES = 2**29
"""Address space of the process. Python with Jinja has a tenth to a half of it."""
MOST_CHARACTERS = 2**24
"""Of a rendered text."""
MOST_SOURCE = 2**20
"""Characters of a template. Those of published checkpoints have up to some ten thousand."""
_WORKER = Path(__file__).with_name("template_worker.py")


class TemplateLimitError(RequestError):
    """A template takes more time or memory than one may, or writes more."""


class TemplateProcess:
    """Renders one template. Threads may share it."""

    def __init__(self, source: str) -> None:
        """Raises: TemplateLimitError: the source is far longer than any template."""
        if len(source) > MOST_SOURCE:
            raise TemplateLimitError(f"a chat template of {len(source)} characters, expected at most {MOST_SOURCE}")
        self._source, self._lock = source, threading.Lock()
        self._worker: _Worker | None = None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text that the template makes of some variables; what is not JSON among them becomes its type's name.

        Raises:
            RequestError: the template does not take them; TemplateLimitError: it goes beyond a limit.
            EngineError: its process cannot be started.
        """
        try:
            line = json.dumps(variables, default=_type_name)
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestError(
                "chat_template_kwargs: too deep, or no JSON: expected values as in JSON", field="chat_template_kwargs"
            ) from error
        with self._lock:
            if self._worker is None or not self._worker.is_mine_and_runs:
                self._worker = _Worker(self._source)
            try:
                reply = self._worker.ask(line)
            except BaseException as error:  # what comes next of it would be the answer to this
                self._worker.end()
                self._worker = None
                if isinstance(error, EOFError):
                    raise TemplateLimitError(f"the model's chat template cannot be rendered: {error}") from None
                raise
        return _text(reply)


class _Worker:
    """The process. It also ends when this process does, however that ends."""

    def __init__(self, source: str) -> None:
        limits = [str(limit) for limit in (SECONDS, MEMORY_BYTES, MOST_CHARACTERS)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER), *limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # Ctrl-C on a terminal is for this process alone
            )
        except OSError as error:
            raise EngineError(f"the process that renders chat templates cannot be started: {error.strerror}") from error
        self._owner = os.getpid()
        self.end = weakref.finalize(self, _end, self._process)
        self._first_line = json.dumps(source) + "\n"

    @property
    def is_mine_and_runs(self) -> bool:
        """False in a process that was forked from the one that started it: the two would get each other's texts."""
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, line: str) -> dict[str, Any]:
        """The reply to a line.

        Raises:
            EOFError: the process has ended; says why.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write((self._first_line + line + "\n").encode())
            self._process.stdin.flush()
            self._first_line = ""
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        if not reply.endswith(b"\n"):
            if self._process.wait() == -signal.SIGPROF:
                raise EOFError(f"it takes more than {SECONDS:g} s")
            raise EOFError(f"it needs more than {MEMORY_BYTES >> 20} MB of memory")
        return dict(json.loads(reply))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # of a line that was not sent
                pipe.close()


def _text(reply: Mapping[str, Any]) -> str:
    if "text" in reply:
        return str(reply["text"])
    if "characters" in reply:
        raise TemplateLimitError(
            f"the model's chat template writes {reply['characters']} characters, expected at most {MOST_CHARACTERS}"
        )
    if "memory" in reply:
        raise TemplateLimitError(f"the model's chat template needs more than {MEMORY_BYTES >> 20} MB of memory")
    reason = f": its line {reply['line']} is no valid Jinja" if "line" in reply else ""
    reason = f": {reply['raised']}" if "raised" in reply else reason
    raise RequestError(f"messages do not suit the model's chat template{reason}")


def _type_name(value: object) -> str:
    return f"<{type(value).__name__}>"
