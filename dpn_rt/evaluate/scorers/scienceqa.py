"""ScienceQA: multiple choice with and without a picture. https://arxiv.org/abs/2209.09513, as LLaVA scores it.

The answer is a letter A to E alone; or the letter before ". " where the text begins so; or the one after "The answer is
" where the text has that once, with any character after the letter. It is right where the letter is that of the right
choice. The image accuracy is that of the questions with a picture.

Annotations: ScienceQA's directory with `problems.json` and `pid_splits.json` (`--split`, default test), `problems.json`
alone for all splits, or rows with `choices` (or columns A, B, ...) and `answer`, a letter or a number from 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.readers.files import read_json_file
from dpn_rt.evaluate.readers.rows import is_empty
from dpn_rt.evaluate.scorers.benchmark import Benchmark, percent
from dpn_rt.evaluate.scorers.exact import truth_of_row
from dpn_rt.evaluate.scorers.truth import Answer, Graded, Inputs, Truth, good_rows

LETTERS = "ABCDE"
_IN_A_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def letter_of(text: str) -> str | None:
    """The letter that an answer names; None where it names none."""
    if text in LETTERS and len(text) == 1:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _IN_A_SENTENCE.findall(text)
    return str(found[0]) if len(found) == 1 else None


def read(inputs: Inputs) -> list[Truth]:
    """The letters of the right choices."""
    path = inputs.annotations
    if path.is_dir():
        splits = read_json_file(path / "pid_splits.json")
        if not isinstance(splits, dict) or inputs.split not in splits:
            raise EvaluationError(f"{path}: --split {inputs.split}: expected one of {', '.join(splits)}")
        problems = read_json_file(path / "problems.json")
        return [_of_problem(problems, str(name), path) for name in splits[inputs.split]]
    if path.name == "problems.json":
        problems = read_json_file(path)
        return [_of_problem(problems, name, path) for name in problems]
    return [_lettered(truth_of_row(row, str(path)), path) for row in good_rows(path)]


def _of_problem(problems: dict[str, Any], name: str, path: Path) -> Truth:
    problem = problems.get(name)
    if not isinstance(problem, dict) or not isinstance(problem.get("choices"), list):
        raise EvaluationError(f"{path}: problem {name!r:.100}: expected choices and the number of the answer")
    truth = Truth(
        ids=(name,),
        answers=(str(problem.get("answer")),),
        choices=tuple(map(str, problem["choices"])),
        has_image=not is_empty(problem.get("image")),
    )
    return _lettered(truth, path)


def _lettered(truth: Truth, path: Path) -> Truth:
    """With the answer's letter, which may be given as a number."""
    answer = truth.answers[0].strip()
    letters = LETTERS[: len(truth.choices)] if truth.choices else LETTERS
    letter = letters[int(answer)] if answer.isdecimal() and int(answer) < len(letters) else answer
    if len(letter) != 1 or letter not in letters:
        raise EvaluationError(
            f"{path}: question {truth.ids[0]}: answer {answer!r:.100}, expected a letter {letters[0]} to {letters[-1]} "
            f"or a number 0 to {len(letters) - 1}"
        )
    return Truth(truth.ids, (letter,), truth.text, truth.category, truth.choices, has_image=truth.has_image)


def grade(truth: Truth, answers: Sequence[Answer]) -> float:
    """1 where the answer names the right choice."""
    return float(letter_of(answers[0].text) == truth.answers[0])


def summarize(graded: Sequence[Graded]) -> dict[str, float]:
    """Of all questions, and of those with a picture."""
    with_image = [each.points for each in graded if each.truth.has_image]
    return {"accuracy": percent([each.points for each in graded]), "image accuracy": percent(with_image)}


BENCHMARK = Benchmark("ScienceQA", read, grade, summarize)
