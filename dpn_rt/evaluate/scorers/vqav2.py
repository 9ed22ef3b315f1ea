"""VQAv2: open questions about pictures. https://arxiv.org/abs/1612.00837, the rule of its validation set.

The answer is first processed as for a submission (`answer_text.submitted_answer`). Where the ten people did not all
give the same answer, theirs and the model's are processed as VQA's evaluation does. An answer is worth the mean over
the people of min(1, others who said so / 3). Accuracy is also given for each type of answer (yes/no, number, other).

Annotations: `v2_mscoco_val2014_annotations.json`, or rows with `answers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dpn_rt.evaluate.readers.files import read_json_file
from dpn_rt.evaluate.readers.rows import Row
from dpn_rt.evaluate.scorers.answer_text import one_line, submitted_answer, vqa_accuracy, vqa_answer
from dpn_rt.evaluate.scorers.benchmark import Benchmark
from dpn_rt.evaluate.scorers.exact import read as read_rows
from dpn_rt.evaluate.scorers.exact import truth_of_row
from dpn_rt.evaluate.scorers.truth import Answer, Inputs, Truth, of_people


def read(inputs: Inputs) -> list[Truth]:
    """The people's answers."""
    value = read_json_file(inputs.annotations) if inputs.annotations.suffix == ".json" else None
    if not isinstance(value, dict) or "annotations" not in value:
        return of_people(read_rows(inputs))
    rows = [Row(f"item {number} of annotations", item) for number, item in enumerate(value["annotations"], 1)]
    name = str(inputs.annotations)
    truths = [replace(truth_of_row(row, name), category=str(row.values.get("answer_type", ""))) for row in rows]
    return of_people(truths)


def grade(truth: Truth, answers: Sequence[Answer]) -> float:
    """See above."""
    answer, people = submitted_answer(answers[0].text), [one_line(given) for given in truth.answers]
    if len(set(people)) > 1:
        answer, people = vqa_answer(answer), [vqa_answer(given) for given in people]
    return vqa_accuracy(answer, people)


BENCHMARK = Benchmark("VQAv2", read, grade)
