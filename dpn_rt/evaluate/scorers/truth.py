"""What is right, what was answered, and how the two are brought together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.readers.files import read_rows
from dpn_rt.evaluate.readers.rows import BadRow, Row
from dpn_rt.schema.text import few, shown


@dataclass(frozen=True)
class Inputs:
    """Where a benchmark's right answers are."""

    annotations: Path
    """A file, or a directory where the benchmark comes as one."""
    question_file: Path | None = None
    """For benchmarks whose annotations do not have the ids of the questions."""
    split: str = "test"
    """Of ScienceQA."""


@dataclass(frozen=True)
class Truth:
    """One question and its right answers."""

    ids: tuple[str, ...]
    """Any of which an answers file may have as `question_id`; whole numbers as text."""
    answers: tuple[str, ...]
    """Right answers; one, or one of each person who was asked."""
    text: str = ""
    """Of the question, to tell those of one id apart."""
    category: str = ""
    choices: tuple[str, ...] = ()
    group: str = ""
    """Questions that count together, such as those about one image of MME."""
    has_image: bool = True


@dataclass(frozen=True)
class Answer:
    """One line of an answers file."""

    question_id: str
    prompt: str
    text: str
    round_id: int = 0
    options: tuple[str, ...] = ()
    letters: tuple[str, ...] = ()
    """What each option's letter was in the first round."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graded:
    """A question, its answers (several where it was asked in rounds, or none) and what they are worth."""

    truth: Truth
    answers: tuple[Answer, ...]
    points: float
    """0 to 1."""


def read_answers(path: Path) -> list[Answer]:
    """The answers of a file, of this product or of LLaVA.

    Raises:
        EvaluationError: it cannot be read, or a line is no answer.
    """
    answers = []
    for row in read_rows(path):
        if isinstance(row, BadRow):
            raise EvaluationError(f"{path}: {row.place}: not an answer: {row.reason}")
        answers.append(_answer(row, path))
    if not answers:
        raise EvaluationError(f"{path}: there are no answers")
    return answers


def _answer(row: Row, path: Path) -> Answer:
    values = row.values
    if "question_id" not in values or not isinstance(values.get("text"), str):
        found = ", ".join(values)[:200]
        raise EvaluationError(f"{path}: {row.place}: not an answer: expected question_id and text, got {found}")

    def optional(name: str, kind: type, default: Any) -> Any:
        value = values.get(name) or default
        if not isinstance(value, kind):
            raise EvaluationError(
                f"{path}: {row.place}: not an answer: {name}={shown(value)}, expected {kind.__name__} or none"
            )
        return value

    return Answer(
        question_id=str(values["question_id"]),
        prompt=str(values.get("prompt", "")),
        text=values["text"],
        round_id=optional("round_id", int, 0),
        options=tuple(map(str, optional("options", list, []))),
        letters=tuple(map(str, optional("option_char", list, []))),
        metadata=optional("metadata", dict, {}),
    )


def of_people(truths: list[Truth]) -> list[Truth]:
    """The same, if several people answered each question: by VQA's rule one alone makes no answer worth anything.

    Raises:
        EvaluationError: a question has one answer.
    """
    lonely = next((truth for truth in truths if len(truth.answers) < 2), None)
    if lonely is not None:
        raise EvaluationError(
            f"question {lonely.ids[0]!r:.100}: one answer, expected answers of several people; exact compares with one"
        )
    return truths


def good_rows(path: Path) -> Iterator[Row]:
    """The rows of annotations.

    Raises:
        EvaluationError: one is none.
    """
    for row in read_rows(path):
        if isinstance(row, BadRow):
            raise EvaluationError(f"{path}: {row}")
        yield row


def first_line(text: str) -> str:
    """The question itself, without options or instructions."""
    return text.strip().split("\n")[0].strip()


def pair(
    truths: Sequence[Truth], answers: Sequence[Answer], asked: Callable[[str], str]
) -> list[tuple[Truth, tuple[Answer, ...]]]:
    """The answers to each question, found by its ids, and by its text where several questions have one id.

    Args:
        truths: all questions.
        answers: of a file.
        asked: takes what is not the question itself from a prompt or a text.

    Raises:
        EvaluationError: no answer belongs to any question, or a question has two answers in one round.
    """
    by_id: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_id[answer.question_id].append(answer)
    uses: dict[str, int] = defaultdict(int)
    for truth in truths:
        for name in dict.fromkeys(truth.ids):
            uses[name] += 1
    pairs = []
    for truth in truths:
        names = list(dict.fromkeys(truth.ids))
        found = [answer for name in names for answer in by_id.get(name, ())]
        if any(uses[name] > 1 for name in names) or _has_two(found):
            found = [answer for answer in found if _same(asked(truth.text), asked(answer.prompt))]
        if _has_two(found):
            raise EvaluationError(f"question {names[0]!r:.100} has {len(found)} answers: expected one")
        pairs.append((truth, tuple(found)))
    if not any(found for _, found in pairs):
        wanted, got = (few([repr(name) for name in names][:3]) for names in ([t.ids[0] for t in truths], list(by_id)))
        raise EvaluationError(
            f"no answer belongs to any of {len(truths)} questions: expected question_ids such as {wanted}, got {got}"
        )
    return pairs


def _has_two(answers: Sequence[Answer]) -> bool:
    """Whether there are two of one round."""
    return len({answer.round_id for answer in answers}) < len(answers)


def _same(first: str, second: str) -> bool:
    return re.sub(r"\s+", " ", first).strip().lower() == re.sub(r"\s+", " ", second).strip().lower()
