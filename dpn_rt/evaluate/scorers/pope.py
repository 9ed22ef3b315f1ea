"""POPE: is an object in the picture? https://arxiv.org/abs/2305.10355, as LLaVA scores it.

An answer is its first sentence: no where that has the word "No", "no" or "not", else yes. Precision, recall and F1 are
those of yes; the yes ratio is the share of answers that are yes. Each category (random, popular, adversarial) is scored
by itself, and the totals are the means over the categories. A question without an answer counts as its contrary.

Annotations: rows with `question_id` and `label` (or `answer`) and, for the categories, `category`, such as a question
file; or POPE's directory of `coco_pope_*.json`, whose ids are others than LLaVA's: then `--question-file` is needed,
whose rows of a category stand in the order of that category's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.readers.rows import Row, category_of, first_of, question_id_of
from dpn_rt.evaluate.scorers.benchmark import Benchmark
from dpn_rt.evaluate.scorers.exact import truth_of_row
from dpn_rt.evaluate.scorers.truth import Answer, Graded, Inputs, Truth, good_rows

LABELS = ("yes", "no")
METRICS = ("accuracy", "precision", "recall", "f1", "yes ratio")


def said(text: str) -> str:
    """ "yes" or "no"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def read(inputs: Inputs) -> list[Truth]:
    """The labels."""
    if inputs.annotations.is_dir():
        return _of_directory(inputs)
    truths = [truth_of_row(row, str(inputs.annotations)) for row in good_rows(inputs.annotations)]
    return [_checked(replace(truth, answers=(truth.answers[0].strip().lower(),))) for truth in truths]


def _checked(truth: Truth) -> Truth:
    if truth.answers[0] not in LABELS:
        raise EvaluationError(f"question {truth.ids[0]}: label {truth.answers[0]!r:.100}, expected yes or no")
    return truth


def _of_directory(inputs: Inputs) -> list[Truth]:
    if inputs.question_file is None:
        raise EvaluationError(f"{inputs.annotations}: a directory: expected --question-file too, for the categories")
    files = sorted(inputs.annotations.glob("coco_pope_*.json"))
    if not files:
        raise EvaluationError(f"{inputs.annotations}: expected files coco_pope_*.json there")
    questions: dict[str, list[Row]] = {}
    for row in good_rows(inputs.question_file):
        questions.setdefault(category_of(row), []).append(row)
    return [truth for file in files for truth in _of_category(file, questions.get(file.stem[len("coco_pope_") :], []))]


def _of_category(file: Path, questions: Sequence[Row]) -> list[Truth]:
    labels = list(good_rows(file))
    if len(labels) != len(questions):
        raise EvaluationError(f"{file}: {len(labels)} labels, the question file has {len(questions)} of this category")
    truths = []
    for asked, label in zip(questions, labels, strict=True):
        images = [row.values.get("image") for row in (asked, label)]
        if images[0] != images[1]:
            raise EvaluationError(
                f"{file}: {label.place} is about {images[1]!r:.100}, {asked.place} of the question file about "
                f"{images[0]!r:.100}: expected the same order"
            )
        answer = str(label.values.get("label", "")).strip().lower()
        text = str(first_of(asked, ("text", "question")) or "")
        truths.append(_checked(Truth((str(question_id_of(asked)),), (answer,), text, category_of(asked))))
    return truths


def grade(truth: Truth, answers: Sequence[Answer]) -> float:
    """1 where the answer is the label."""
    return float(said(answers[0].text) == truth.answers[0])


def summarize(graded: Sequence[Graded]) -> dict[str, float]:
    """Means over the categories, then each of them."""
    categories = sorted({each.truth.category for each in graded})
    tables = {name: _measures([each for each in graded if each.truth.category == name]) for name in categories}
    totals = {metric: fmean(table[metric] for table in tables.values()) for metric in METRICS}
    if len(categories) > 1:
        totals |= {f"{metric}, {name}": table[metric] for name, table in tables.items() for metric in METRICS}
    return totals


def _measures(graded: Sequence[Graded]) -> dict[str, float]:
    is_yes = [each.truth.answers[0] == "yes" for each in graded]
    said_yes = [truth == (each.points == 1) for truth, each in zip(is_yes, graded, strict=True)]
    right_yes = sum(truth and answer for truth, answer in zip(is_yes, said_yes, strict=True))
    precision = right_yes / sum(said_yes) if any(said_yes) else 0.0
    recall = right_yes / sum(is_yes) if any(is_yes) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right_yes else 0.0
    shares = (fmean(each.points for each in graded), precision, recall, f1, fmean(said_yes))
    return {metric: 100 * share for metric, share in zip(METRICS, shares, strict=True)}


BENCHMARK = Benchmark("POPE", read, grade, summarize)
