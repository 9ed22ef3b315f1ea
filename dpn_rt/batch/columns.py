"""The columns of a table of questions, checked before anything is answered."""

from __future__ import annotations

from collections.abc import Sequence

from dpn_rt.batch.answer_schema import ANSWER_SCHEMA
from dpn_rt.batch.options import AnswerOptions
from dpn_rt.errors import RequestError
from dpn_rt.schema.text import few


def check_columns(table: str, names: Sequence[str], options: AnswerOptions, id_column: str | None = None) -> None:
    """Refuses a table whose answers would have no place, or two.

    Args:
        table: what it is called in messages.
        names: of its columns.
        options: which of them are read.
        id_column: that answers are found by; None: by none.

    Raises:
        RequestError: a column is missing, stands twice, or has the name of a column of answers.
    """
    read = [options.question_column, options.image_column] + ([] if id_column is None else [id_column])
    for name in read:
        if name not in names:
            raise RequestError(f"{table}: no column {name!r}, expected one of {few(names)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RequestError(f"{table}: columns {few(twice)} stand more than once, expected every name once")
    if options.image_column in read[:1] + read[2:]:
        raise RequestError(
            f"{table}: column {options.image_column!r} has the images, which are left out of the answers: expected "
            "another one for questions and ids"
        )
    taken = [name for name in ANSWER_SCHEMA.names if name in names and name != options.image_column]
    if taken:
        raise RequestError(
            f"{table}: has columns {few(taken)}, which the answers get: expected other names, such as {taken[0]}_given"
        )
