"""Parquet files -> rows. They need the package pyarrow."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.optional import need
from dpn_rt.evaluate.readers.rows import BadRow, Row
from dpn_rt.schema.files import open_file

ROWS_AT_ONCE = 64
"""Images of so many rows are in memory."""


def read_parquet(path: Path) -> Iterator[Row | BadRow]:
    """The rows of a parquet file.

    Raises:
        EvaluationError: pyarrow is not installed, or the file cannot be read.
    """
    need("pyarrow", f"{path}: parquet")
    parquet = importlib.import_module("pyarrow.parquet")
    errors = importlib.import_module("pyarrow").ArrowException
    with open_file(path, EvaluationError) as file:
        number = 0
        try:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=ROWS_AT_ONCE):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", values)
        except errors as error:
            raise EvaluationError(f"{path}: no parquet file that can be read after row {number}") from error
