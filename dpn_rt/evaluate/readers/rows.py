"""Rows of files, and the columns that they may have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpn_rt.errors import EvaluationError
from dpn_rt.schema.text import shown

ID_COLUMNS = ("question_id", "index", "id")
TEXT_COLUMNS = ("text", "question")
CATEGORY_COLUMNS = ("category", "kind", "question_type")


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    place: str
    """Such as "line 7"."""
    values: Mapping[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    place: str
    question_id: str | int | None
    """None where the row has none."""
    reason: str

    def __str__(self) -> str:
        asked = "" if self.question_id is None else f" (question_id {self.question_id!r:.100})"
        return f"{self.place}{asked}: {self.reason}"


def is_empty(value: Any) -> bool:
    """Whether a cell of a table is empty; pandas writes "nan" there."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and value.strip().lower() in ("", "nan", "none")


def first_of(row: Row, columns: Sequence[str]) -> Any:
    """The value of the first of some columns that the row has; None where it has none."""
    return next((row.values[column] for column in columns if not is_empty(row.values.get(column))), None)


def question_id_of(row: Row) -> str | int:
    """The id of a row; a whole number in a table is a number, as it is for LLaVA.

    Raises:
        EvaluationError: the row has none.
    """
    value = first_of(row, ID_COLUMNS)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        wanted = f"a column {', '.join(ID_COLUMNS)}"
        raise EvaluationError(f"no question_id: expected {_unmet(row, ID_COLUMNS, wanted, 'a text or a whole number')}")
    return value


def text_of(row: Row) -> str:
    """The question of a row.

    Raises:
        EvaluationError: the row has none.
    """
    value = first_of(row, TEXT_COLUMNS)
    if value is None:
        wanted = f"a text in the column {' or '.join(TEXT_COLUMNS)}"
        raise EvaluationError(f"no question: expected {_unmet(row, TEXT_COLUMNS, wanted, 'a text that is not empty')}")
    return str(value)


def _unmet(row: Row, columns: Sequence[str], column: str, value: str) -> str:
    """What is expected of a row, and what it has: a column, or another value of one that it has."""
    given = [f"{name}={shown(row.values[name])}" for name in columns if name in row.values]
    if given:
        return f"{value}, got {', '.join(given)}"
    return f"{column}, got {', '.join(map(str, row.values))[:200] or 'nothing'}"


def category_of(row: Row) -> str:
    """The kind of question that a row says it is; empty where it says none."""
    value = first_of(row, CATEGORY_COLUMNS)
    return value if isinstance(value, str) else ""


def choices_of(row: Row) -> tuple[str, ...]:
    """The options of a multiple-choice question: columns `A`, `B`, ... or `choice_a`, `choice_b`, ..., or a list
    `choices`; empty for other questions."""
    given = row.values.get("choices")
    if isinstance(given, Sequence) and not isinstance(given, str):
        return tuple(str(choice) for choice in given)
    found: list[str] = []
    for letter in "ABCDEFGHIJ":
        value = row.values.get(letter, row.values.get(f"choice_{letter.lower()}"))
        if is_empty(value):
            break
        found.append(str(value))
    return tuple(found)
