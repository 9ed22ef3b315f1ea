"""Logs of the server: one line per event, without any content of prompts or images."""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import TextIO

LINES_A_SECOND = 50
"""Of one kind: of one text before its values are filled in."""
TRACEBACKS_A_SECOND = 3


class Throttle(logging.Filter):
    """Leaves out lines of a kind beyond a number per second, and says with the next line how many they were.

    What clients do makes log lines, so clients could fill a disk with them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._lock = clock, threading.Lock()
        self._second = 0
        self._counts: Counter[tuple[str, str]] = Counter()
        """Lines of each kind in this second."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is written."""
        kind = (record.name, str(record.msg))
        most = TRACEBACKS_A_SECOND if record.exc_info else LINES_A_SECOND
        with self._lock:
            if (second := int(self._clock())) != self._second:
                left_out = sum(max(0, count - LINES_A_SECOND) for count in self._counts.values())
                self._second = second
                self._counts.clear()
                if left_out:
                    record.msg, record.args = f"{record.getMessage()} ({left_out} other lines were left out)", ()
            self._counts[kind] += 1
            return self._counts[kind] <= most


class PromptHandler(logging.StreamHandler[TextIO]):
    """Writes what can be written at once. A pipe that nothing reads, or a full disk, must not stop the server."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line, or as much of it as there is room for."""
        try:
            line = (self.format(record) + self.terminator).encode("utf-8", "backslashreplace")
            file = self.stream.fileno()
        except (AttributeError, OSError):  # closed, or a stream of this process
            super().emit(record)
            return
        poll = select.poll()
        poll.register(file, select.POLLOUT)
        for start in range(0, len(line), select.PIPE_BUF):  # so many bytes fit into a pipe that has room
            try:
                if not poll.poll(0):
                    return
                os.write(file, line[start : start + select.PIPE_BUF])
            except OSError:
                return

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Says nothing: there is no place to say it."""


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def set_up_logs(level: str, *, as_json: bool) -> None:
    """Sends the logs of dpn_rt, uvicorn and OpenTelemetry, and Python's warnings, to standard error; nothing of Pillow.

    Pillow warns of damaged images, with numbers of the file. Python would print each new text, and keep it for ever.
    """
    warnings.filterwarnings("ignore", module=r"PIL\b")
    handler = PromptHandler(sys.stderr)
    handler.addFilter(Throttle())
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.captureWarnings(True)
    for name in ("dpn_rt", "uvicorn", "opentelemetry", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
