"""Excel files of one sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpn_rt.evaluate.optional import need

FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
"""Characters that XML cannot hold."""


def xlsx(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """An Excel file with one sheet: whole numbers and texts below the names of the columns.

    A text stays a text, also where it begins like a formula. Characters that an Excel file cannot hold are left out.

    Args:
        columns: of the sheet.
        rows: a value a column; one that is missing or None is an empty cell.

    Raises:
        EvaluationError: openpyxl is not installed.
    """
    openpyxl: Any = need("openpyxl", "an Excel file")
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")

    def cells(values: Sequence[Any]) -> Iterator[Any]:
        for value in values:
            is_number = isinstance(value, int) and not isinstance(value, bool)
            text = "" if value is None or is_number else FORBIDDEN.sub("", str(value))
            cell = openpyxl.cell.WriteOnlyCell(sheet, value if is_number else text or None)
            if text:
                cell.data_type = "s"  # "=1+1" would be computed
            yield cell

    for values in (columns, *([row.get(column) for column in columns] for row in rows)):
        sheet.append(list(cells(values)))
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()
