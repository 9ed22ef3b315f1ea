"""Log lines: of one kind not more than a few a second."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from dpn_rt.server.logs import LINES_A_SECOND, TRACEBACKS_A_SECOND, PromptHandler, Throttle


def record(text: str, *values: object, with_traceback: bool = False) -> logging.LogRecord:
    try:
        raise ValueError("no such luck")
    except ValueError:
        trace = sys.exc_info() if with_traceback else None
    return logging.LogRecord("dpn_rt.server", logging.INFO, "file", 1, text, values, trace)


def written(throttle: Throttle, records: Iterable[logging.LogRecord]) -> list[str]:
    return [each.getMessage() for each in records if throttle.filter(each)]


def test_damaged_images_write_no_lines_of_pillow() -> None:
    """In a process of its own, as a server sets its logs up. Python would keep each text that it has shown."""
    code = """
import warnings
from dpn_rt.server.logs import set_up_logs
set_up_logs("info", as_json=False)
registry = {}
for i in range(3):
    warnings.warn_explicit(f"Skipping tag {i}", UserWarning, "a.py", 1, "PIL.TiffImagePlugin", registry)
assert not {key for key in registry if key != "version"}, registry
warnings.warn("another")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "another" in result.stderr and "Skipping" not in result.stderr, result.stderr


def test_libraries_write_as_the_server_does() -> None:
    """Every line of a JSON log is JSON."""
    code = """
import logging, warnings
from dpn_rt.server.logs import set_up_logs
set_up_logs("info", as_json=True)
logging.getLogger("opentelemetry.exporter").error("Failed to export %s", "spans")
warnings.warn("old")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert [(line["logger"], line["level"]) for line in lines] == [
        ("opentelemetry.exporter", "error"),
        ("py.warnings", "warning"),
    ]
    assert lines[0]["message"] == "Failed to export spans" and "old" in lines[1]["message"]


def test_lines_of_one_kind_are_left_out_and_counted() -> None:
    now = [100.2]
    throttle = Throttle(lambda: now[0])
    assert len(written(throttle, [record("request %s: 401", i) for i in range(1000)])) == LINES_A_SECOND
    assert written(throttle, [record("engine stopped")]) == ["engine stopped"], "other kinds are written"
    now[0] = 101.1
    again = written(throttle, [record("request %s: 401", i) for i in range(3)])
    assert again == [
        f"request 0: 401 ({1000 - LINES_A_SECOND} other lines were left out)",
        "request 1: 401",
        "request 2: 401",
    ]
    now[0] = 102.5
    assert written(throttle, [record("request %s: 401", 7)]) == ["request 7: 401"]


def test_a_pipe_that_nothing_reads_stops_nobody() -> None:
    ends = os.pipe()
    with os.fdopen(ends[0], "rb") as reading, os.fdopen(ends[1], "w") as writing:
        handler = PromptHandler(writing)
        for number in range(2000):  # far more than a pipe holds
            handler.emit(record(f"{number} " + "x" * (number % 7) * 2000))
        lines = os.read(reading.fileno(), 2**20).decode().splitlines()
    assert lines[0] == "0 " and len(lines) > 5


def test_a_line_goes_where_there_is_a_place_for_it() -> None:
    for path in ("/dev/full", "/dev/null"):
        with Path(path).open("w") as stream:
            PromptHandler(stream).emit(record("lost"))
    text = io.StringIO()
    PromptHandler(text).emit(record("kept %s", "ü"))
    assert text.getvalue() == "kept ü\n"
    closed = io.StringIO()
    closed.close()
    PromptHandler(closed).emit(record("lost"))


def test_tracebacks_are_written_less_often() -> None:
    throttle = Throttle(lambda: 5.0)
    records = [record("request %s: internal error", i, with_traceback=True) for i in range(100)]
    assert len(written(throttle, records)) == TRACEBACKS_A_SECOND
