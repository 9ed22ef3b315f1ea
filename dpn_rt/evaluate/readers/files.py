"""A file of any format that is read -> its rows, in bounded memory where the format allows it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.readers.image_references import with_images
from dpn_rt.evaluate.readers.parquet import read_parquet
from dpn_rt.evaluate.readers.rows import BadRow, Row
from dpn_rt.evaluate.readers.tables import read_table
from dpn_rt.schema.files import open_file, read_file
from dpn_rt.schema.json_text import parse_json

MAX_LINE_BYTES = 2**28
"""Of one question; one that holds an image in base64 has some megabytes."""
MAX_JSON_BYTES = 2**31
"""Of a JSON file, which is read as a whole; VQAv2's annotations of its training images have 400 MB."""
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_rows(path: Path) -> Iterator[Row | BadRow]:
    """The rows of a file, in its order; those that are no row are told.

    `.jsonl` has an object a line, and `.json` a list of them, or an object whose values are rows by their id.

    Raises:
        EvaluationError: the file cannot be read, or has another format than its name says.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _lines(path)
    if suffix == ".json":
        return _json_rows(path)
    if suffix in (".csv", ".tsv"):
        return with_images(partial(read_table, path, "," if suffix == ".csv" else "\t"))
    if suffix == ".parquet":
        return read_parquet(path)
    raise EvaluationError(f"{path}: expected a file whose name ends in {', '.join(FORMATS)}")


def read_json_file(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        EvaluationError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(read_file(path, EvaluationError, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        where = f": line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise EvaluationError(f"{path}: not JSON (truncated?){where}") from error


def _lines(path: Path) -> Iterator[Row | BadRow]:
    with open_file(path, EvaluationError) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            place = f"line {number}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise EvaluationError(f"{path}: {place} has more than {MAX_LINE_BYTES:,} bytes")
            if not line.strip():
                continue
            try:
                value = parse_json(line.rstrip(), place, EvaluationError)
            except EvaluationError as error:
                yield BadRow(place, None, str(error).removeprefix(f"{place}: ").replace("line 1, column", "column"))
                continue
            yield _row(place, value)


def _json_rows(path: Path) -> Iterator[Row | BadRow]:
    """POPE's files have an object a line although their names end in `.json`."""
    with open_file(path, EvaluationError) as file:
        size = os.fstat(file.fileno()).st_size
        first_line = file.readline(1 << 20)
    is_object = first_line.lstrip().startswith(b"{") and first_line.endswith((b"}\n", b"}\r\n"))
    is_lines = is_object and len(first_line) < size
    if is_lines:
        yield from _lines(path)
        return
    value = read_json_file(path)
    if isinstance(value, dict):
        value = [{"question_id": name, **row} if isinstance(row, dict) else row for name, row in value.items()]
    if not isinstance(value, list):
        raise EvaluationError(f"{path}: expected a list of questions, got {type(value).__name__}")
    for number, item in enumerate(value, 1):
        yield _row(f"item {number}", item)


def _row(place: str, value: Any) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(place, value)
    return BadRow(place, None, f"expected an object with question_id, image and text, got {type(value).__name__}")
