"""VizWiz: questions of blind people about their photographs. https://arxiv.org/abs/1802.08218, its validation set.

The answer is processed as for a submission (`answer_text.submitted_answer`), people's answers are taken as they are. It
is worth the mean over the people of min(1, others who said so / 3). "unanswerable" is an answer as any other. Accuracy
is also given for each type of answer.

Annotations: `val.json`, a list with `image`, `question` and `answers`; `--question-file` says which image a question_id
is about, unless the ids are the images' names. Or rows with `question_id` and `answers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dpn_rt.evaluate.readers.rows import ID_COLUMNS, Row, question_id_of
from dpn_rt.evaluate.scorers.answer_text import submitted_answer, vqa_accuracy
from dpn_rt.evaluate.scorers.benchmark import Benchmark
from dpn_rt.evaluate.scorers.exact import truth_of_row
from dpn_rt.evaluate.scorers.truth import Answer, Inputs, Truth, good_rows, of_people


def read(inputs: Inputs) -> list[Truth]:
    """The people's answers."""
    rows = list(good_rows(inputs.annotations))
    ids = {}
    if inputs.question_file is not None and inputs.question_file != inputs.annotations:
        ids = {str(row.values.get("image")): str(question_id_of(row)) for row in good_rows(inputs.question_file)}
    truths = []
    for row in rows:
        image = str(row.values.get("image"))
        has_id = any(column in row.values for column in ID_COLUMNS)
        named = row if has_id else Row(row.place, {"question_id": image, **row.values})
        truth = truth_of_row(named, str(inputs.annotations))
        names = (ids[image],) if image in ids else truth.ids
        truths.append(replace(truth, ids=names, category=str(row.values.get("answer_type", ""))))
    return of_people(truths)


def grade(truth: Truth, answers: Sequence[Answer]) -> float:
    """See above."""
    return vqa_accuracy(submitted_answer(answers[0].text), truth.answers)


BENCHMARK = Benchmark("VizWiz", read, grade)
