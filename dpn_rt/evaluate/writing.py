"""Files that a command makes as a whole."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from dpn_rt.errors import EvaluationError


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file, or leaves what was there; its directory is made.

    Raises:
        EvaluationError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(0, "Is a directory")
        partial.write_bytes(data)
        partial.replace(target)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise EvaluationError(f"{path}: cannot be written: {error.strerror}") from error


def check_target(path: Path) -> None:
    """Refuses a file that could not be written, before anything is computed for it.

    Raises:
        EvaluationError: with the reason.
    """
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise EvaluationError(f"{path}: cannot be written there: expected a file in a directory that can be written to")


_NAMESPACE = "http://schemas.openxmlformats.org"
_MAIN = f"{_NAMESPACE}/spreadsheetml/2006/main"
_DOCUMENT = f"{_NAMESPACE}/officeDocument/2006/relationships"
_PACKAGE = f"{_NAMESPACE}/package/2006"
_PARTS = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_XML = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
_FRAME = {
    "[Content_Types].xml": f'<Types xmlns="{_PACKAGE}/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    f'<Override PartName="/xl/workbook.xml" ContentType="{_PARTS}.sheet.main+xml"/>'
    f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{_PARTS}.worksheet+xml"/></Types>',
    "_rels/.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
    f'<Relationship Id="rId1" Type="{_DOCUMENT}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": f'<workbook xmlns="{_MAIN}" xmlns:r="{_DOCUMENT}">'
    '<sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
    f'<Relationship Id="rId1" Type="{_DOCUMENT}/worksheet" Target="worksheets/sheet1.xml"/></Relationships>',
}
"""What an Excel file has around its one sheet (ECMA-376)."""


def xlsx(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """An Excel file with one sheet: texts and whole numbers below the names of the columns, equal bytes for equal rows.

    Args:
        columns: of the sheet.
        rows: a value a column; one that is missing or None is an empty cell.
    """
    table: list[list[Any]] = [list(columns), *([row.get(column) for column in columns] for row in rows)]
    lines = "".join(_line(number, values) for number, values in enumerate(table, 1))
    sheet = f'<worksheet xmlns="{_MAIN}"><sheetData>{lines}</sheetData></worksheet>'
    buffer = io.BytesIO()
    with ZipFile(buffer, "w", ZIP_DEFLATED) as archive:
        for name, content in {**_FRAME, "xl/worksheets/sheet1.xml": sheet}.items():
            entry = ZipInfo(name)  # with a date that is always the same
            entry.compress_type = ZIP_DEFLATED
            archive.writestr(entry, (_XML + content).encode())
    return buffer.getvalue()


_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
"""Characters that XML cannot hold."""


def _line(number: int, values: Sequence[Any]) -> str:
    cells = "".join(_cell(f"{_letters(column)}{number}", value) for column, value in enumerate(values))
    return f'<row r="{number}">{cells}</row>'


def _letters(column: int) -> str:
    """A to Z, then AA and so on."""
    before, last = divmod(column, 26)
    return (_letters(before - 1) if before else "") + chr(ord("A") + last)


def _cell(place: str, value: Any) -> str:
    if value is None or value == "":
        return f'<c r="{place}"/>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<c r="{place}"><v>{value}</v></c>'
    text = escape(_FORBIDDEN.sub("", str(value)))
    return f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'
