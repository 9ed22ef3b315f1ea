"""Tables of text (`.csv`, `.tsv`) -> rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.readers.rows import BadRow, Row
from dpn_rt.schema.files import open_file

MAX_CELL = 2**28
"""Characters; cells of MMBench hold images in base64."""


def read_table(path: Path, delimiter: str) -> Iterator[Row | BadRow]:
    """The rows of a table whose first line names the columns.

    Cells are texts, but whole numbers are numbers. A row with more or fewer cells than columns is told.

    Raises:
        EvaluationError: the file cannot be read, is not UTF-8, or is empty.
    """
    with open_file(path, EvaluationError) as binary, io.TextIOWrapper(binary, "utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            with _long_cells():
                header = next(reader, None)
            if not header or len(set(header)) < len(header):
                raise EvaluationError(f"{path}: expected a first line with names of columns, each once, got {header}")
            while True:
                with _long_cells():
                    cells = next(reader, None)
                if cells is None:
                    return
                place = f"line {reader.line_num}"
                if len(cells) == len(header):
                    yield Row(place, {name: _value(cell) for name, cell in zip(header, cells, strict=True)})
                elif cells:
                    yield BadRow(place, None, f"{len(cells)} cells, expected {len(header)} as the first line has")
        except UnicodeDecodeError as error:
            wrong = error.object[error.start]  # of a block that is read ahead, so its line is not known
            raise EvaluationError(f"{path}: has the byte 0x{wrong:02x}, expected a table saved as UTF-8") from error
        except csv.Error as error:
            raise EvaluationError(f"{path}: line {reader.line_num}: no cells of a table can be told apart") from error


def _value(cell: str) -> str | int:
    is_number = cell.isascii() and cell.isdecimal() and len(cell) <= 18 and (cell == "0" or cell[0] != "0")
    return int(cell) if is_number else cell


@contextmanager
def _long_cells() -> Iterator[None]:
    """The bound is the module's, for the whole process."""
    before = csv.field_size_limit(MAX_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)
