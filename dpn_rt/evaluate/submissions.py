"""Answers -> the files that the servers of benchmarks take."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.excel import xlsx
from dpn_rt.evaluate.readers.rows import question_id_of
from dpn_rt.evaluate.scorers.answer_text import submitted_answer
from dpn_rt.evaluate.scorers.truth import Answer, good_rows
from dpn_rt.schema.text import few

DROPPED_COLUMNS = ("hint", "category", "source", "image", "comment", "l2-category")
"""Of MMBench's table, as LLaVA does."""
PREDICTION_AT = 6
"""Place of the column with the answers."""


def vqav2(answers: Sequence[Answer], question_file: Path) -> bytes:
    """VQAv2 on EvalAI: the answer to every question of the split, empty where there is none."""
    by_id = _by_id(answers)
    result = []
    for row in good_rows(question_file):
        question_id = question_id_of(row)
        answer = by_id.get(str(question_id))
        result.append({"question_id": question_id, "answer": "" if answer is None else submitted_answer(answer.text)})
    return _json(result)


def vizwiz(answers: Sequence[Answer], question_file: Path) -> bytes:
    """VizWiz on EvalAI: the answer about every image.

    Raises:
        EvaluationError: one is missing.
    """
    by_id, rows = _by_id(answers), list(good_rows(question_file))
    missing = [str(question_id_of(row)) for row in rows if str(question_id_of(row)) not in by_id]
    if missing:
        raise EvaluationError(f"VizWiz takes an answer to every question: {len(missing)} are missing: {few(missing)}")
    texts = [submitted_answer(by_id[str(question_id_of(row))].text) for row in rows]
    return _json([{"image": row.values.get("image"), "answer": text} for row, text in zip(rows, texts, strict=True)])


def mmbench(answers: Sequence[Answer], question_file: Path) -> bytes:
    """MMBench's server: the test set's table as an Excel file, with the answers of the first round."""
    by_id = _by_id([answer for answer in answers if answer.round_id == 0])
    rows: list[dict[str, object]] = []
    columns: list[str] = []
    for row in good_rows(question_file):
        answer = by_id.get(str(question_id_of(row)))
        values = {name: value for name, value in row.values.items() if name not in DROPPED_COLUMNS}
        columns = columns or list(values)
        rows.append({**values, "prediction": None if answer is None else answer.text})
    place = min(PREDICTION_AT, len(columns))
    return xlsx([*columns[:place], "prediction", *columns[place:]], rows)


def mmvet(answers: Sequence[Answer], question_file: Path) -> bytes:
    """MM-Vet's notebook: an object with the answer to `v1_<question_id>`."""
    by_id = _by_id(answers)
    ids = [str(question_id_of(row)) for row in good_rows(question_file)]
    texts = {f"v1_{name.removeprefix('v1_')}": by_id[name].text for name in ids if name in by_id}
    return json.dumps(texts, indent=2, ensure_ascii=False).encode()


SUBMISSIONS: Mapping[str, Callable[[Sequence[Answer], Path], bytes]] = {
    "mmbench": mmbench,
    "mmvet": mmvet,
    "vizwiz": vizwiz,
    "vqav2": vqav2,
}
"""Name on the command line -> what makes the file."""


def _by_id(answers: Sequence[Answer]) -> dict[str, Answer]:
    by_id = {answer.question_id: answer for answer in answers}
    if len(by_id) < len(answers):
        counts = [answer.question_id for answer in answers]
        twice = next(name for name in counts if counts.count(name) > 1)
        raise EvaluationError(f"question {twice!r:.100} has {counts.count(twice)} answers: expected one")
    return by_id


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
