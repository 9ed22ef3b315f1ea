"""Questions of files as tables, in a task of a Ray cluster. What this imports each such process loads: no torch."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from dpn_rt.evaluate.question import Question
from dpn_rt.evaluate.source import QuestionSource

if TYPE_CHECKING:
    import pyarrow as pa


def open_questions(
    table: pa.Table, source: QuestionSource, done: Sequence[frozenset[str]], batch_size: int
) -> Iterator[pa.Table]:
    """The open questions of the runs whose numbers a table has, pickled: their images are opened by the engines."""
    import pyarrow

    for number in table["run"].to_pylist():
        questions = (
            {"run": number, "question": pickle.dumps(question)}
            for question in source.questions()
            if isinstance(question, Question) and question.key not in done[number]
        )
        for rows in _in_batches(questions, batch_size):
            yield pyarrow.Table.from_pylist(rows)


def _in_batches(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(rows, size)):
        yield batch
