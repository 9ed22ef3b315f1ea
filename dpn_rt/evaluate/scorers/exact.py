"""Any data with an `answer` (or several `answers`) a row: right is what equals one of them but for spaces around it."""

from __future__ import annotations

from collections.abc import Sequence

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.readers.rows import TEXT_COLUMNS, Row, category_of, choices_of, first_of, is_empty, question_id_of
from dpn_rt.evaluate.scorers.benchmark import Benchmark
from dpn_rt.evaluate.scorers.truth import Answer, Inputs, Truth, good_rows

ANSWER_COLUMNS = ("answer", "label", "answers")


def truth_of_row(row: Row, name: str) -> Truth:
    """The right answers that a row of questions or annotations has in `answer`, `label` or `answers`.

    Args:
        row: of any file.
        name: of the file, for messages.

    Raises:
        EvaluationError: it has none, or no id.
    """
    value = next((row.values[column] for column in ANSWER_COLUMNS if not is_answer_missing(row, column)), None)
    if value is None:
        found = ", ".join(map(str, row.values))[:200]
        raise EvaluationError(f"{name}: {row.place}: expected a column {', '.join(ANSWER_COLUMNS)}, got {found}")
    answers = (
        [each["answer"] if isinstance(each, dict) else each for each in value] if isinstance(value, list) else [value]
    )
    text = first_of(row, TEXT_COLUMNS)
    return Truth(
        ids=(str(question_id_of(row)),),
        answers=tuple(str(answer) for answer in answers),
        text="" if text is None else str(text),
        category=category_of(row),
        choices=choices_of(row),
        has_image=not is_empty(row.values.get("image")),
    )


def is_answer_missing(row: Row, column: str) -> bool:
    """Whether a row lacks an answer there; the answers "none" and "nan" are answers."""
    value = row.values.get(column)
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def read(inputs: Inputs) -> list[Truth]:
    """The right answers of a file of rows."""
    return [truth_of_row(row, str(inputs.annotations)) for row in good_rows(inputs.annotations)]


def grade(truth: Truth, answers: Sequence[Answer]) -> float:
    """1 where the answer is one of the right ones."""
    return float(answers[0].text.strip() in {answer.strip() for answer in truth.answers})


BENCHMARK = Benchmark("exact match", read, grade)
