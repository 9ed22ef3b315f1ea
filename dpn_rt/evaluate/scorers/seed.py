"""SEED-Bench: multiple choice about images and videos. https://arxiv.org/abs/2307.16125, as LLaVA scores it.

The answer is right where it is the letter of the right choice and nothing else. Accuracy is given for all questions,
for those about images and videos, and for each type of question.

Annotations: `SEED-Bench.json`, or rows with `answer` (a letter) and, if there are any, `data_type` and a category.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dpn_rt.evaluate.readers.files import read_json_file
from dpn_rt.evaluate.readers.rows import Row
from dpn_rt.evaluate.scorers.benchmark import Benchmark, accuracy_by_category, percent
from dpn_rt.evaluate.scorers.exact import truth_of_row
from dpn_rt.evaluate.scorers.truth import Answer, Graded, Inputs, Truth, good_rows


def read(inputs: Inputs) -> list[Truth]:
    """The letters of the right choices; `group` is "image" or "video"."""
    value = read_json_file(inputs.annotations) if inputs.annotations.suffix == ".json" else None
    if isinstance(value, dict) and "questions" in value:
        rows = [Row(f"item {number} of questions", item) for number, item in enumerate(value["questions"], 1)]
        names = {number: name for name, number in value.get("question_type", {}).items()}
    else:
        rows, names = list(good_rows(inputs.annotations)), {}
    truths = []
    for row in rows:
        truth = truth_of_row(row, str(inputs.annotations))
        kind = names.get(row.values.get("question_type_id"), truth.category)
        truths.append(replace(truth, category=kind, group=str(row.values.get("data_type", ""))))
    return truths


def grade(truth: Truth, answers: Sequence[Answer]) -> float:
    """1 where the answer is the letter."""
    return float(answers[0].text == truth.answers[0])


def summarize(graded: Sequence[Graded]) -> dict[str, float]:
    """Of all, of images, of videos, of each type."""
    by_type = accuracy_by_category(graded)
    metrics = {"accuracy": by_type.pop("accuracy")}
    for kind in ("image", "video"):
        points = [each.points for each in graded if each.truth.group == kind]
        if points:
            metrics[f"accuracy, {kind}"] = percent(points)
    return metrics | by_type


BENCHMARK = Benchmark("SEED-Bench", read, grade, summarize)
