"""MMBench: multiple choice in all rotations of the options. https://arxiv.org/abs/2307.06281, exact choice.

An answer names an option where it is a letter alone, begins with a letter in the forms "A.", "A)", "(A)", "A:" or "A,",
or is the text of an option, but for case and a period at its end. A language model is never asked, so an answer that
describes an option is wrong here and may be right on the server.

A question that was asked in rounds (`--all-rounds`) is right where every round is. In files whose rotations are rows
with ids 1,000,000 higher, it is right where every row is. "accuracy, first round" counts the first alone.

Annotations: the dev set's `.tsv`, with `answer`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.scorers.benchmark import Benchmark, percent
from dpn_rt.evaluate.scorers.exact import truth_of_row
from dpn_rt.evaluate.scorers.truth import Answer, Graded, Inputs, Truth, good_rows

ROTATION = 1_000_000
_LETTER = re.compile(r"\(?([A-J])\)?(?:$|(?<=\))|[.:,])")


def choice_of(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer names; None where it names none.

    Args:
        text: of the answer.
        options: as they were shown; A is the first.
    """
    text = text.strip()
    found = _LETTER.match(text)
    if found is not None:
        return found.group(1)
    plain = text.rstrip(".").lower()
    equal = [i for i, option in enumerate(options) if option.strip().rstrip(".").lower() == plain]
    return "ABCDEFGHIJ"[equal[0]] if len(equal) == 1 else None


def read(inputs: Inputs) -> list[Truth]:
    """The letters of the right options; `group` is the question that rotations share."""
    truths = []
    for row in good_rows(inputs.annotations):
        truth = truth_of_row(row, str(inputs.annotations))
        letters = "ABCDEFGHIJ"[: len(truth.choices)]
        if not letters or truth.answers[0] not in tuple(letters):
            raise EvaluationError(
                f"{inputs.annotations}: {row.place}: answer {truth.answers[0]!r:.100}, expected the letter of one of "
                f"{len(letters)} options"
            )
        name = truth.ids[0]
        group = str(int(name) % ROTATION) if name.isdecimal() else name
        truths.append(replace(truth, group=group))
    return truths


def grade(truth: Truth, answers: Sequence[Answer]) -> float:
    """1 where all rounds are there and right."""
    is_whole = len(answers) in (1, len(truth.choices))
    return float(is_whole and all(_is_right(truth, answer) for answer in answers))


def _is_right(truth: Truth, answer: Answer) -> bool:
    chosen = choice_of(answer.text, answer.options or truth.choices)
    if chosen is None:
        return False
    number = ord(chosen) - ord("A")
    if answer.letters:  # what was shown as B in a later round was another letter in the first
        chosen = answer.letters[number] if number < len(answer.letters) else ""
    return chosen == truth.answers[0]


def summarize(graded: Sequence[Graded]) -> dict[str, float]:
    """Of questions, with all their rounds or rotations; of the first rounds; of categories."""
    groups: dict[str, list[Graded]] = defaultdict(list)
    for each in graded:
        groups[each.truth.group].append(each)
    all_right = {name: min(each.points for each in rows) for name, rows in groups.items()}
    firsts = [_first_round(rows[0]) for rows in groups.values()]
    metrics = {"accuracy": percent(list(all_right.values())), "accuracy, first round": percent(firsts)}
    by_category: dict[str, list[float]] = defaultdict(list)
    for name, rows in groups.items():
        by_category[rows[0].truth.category].append(all_right[name])
    return metrics | {f"accuracy, {name}": percent(points) for name, points in sorted(by_category.items()) if name}


def _first_round(graded: Graded) -> float:
    firsts = [answer for answer in graded.answers if answer.round_id == 0]
    return float(bool(firsts) and _is_right(graded.truth, firsts[0]))


BENCHMARK = Benchmark("MMBench", read, grade, summarize)
