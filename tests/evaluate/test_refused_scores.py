"""Answers and annotations that cannot be scored are told, for each benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.scorers.table import BENCHMARKS
from tests.evaluate.scoring import Scorer, answers
from tests.evaluate.scoring import scored as scored


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_cannot_be_scored_is_told(scored: Scorer, name: str, tmp_path: Path) -> None:
    with pytest.raises(
        EvaluationError, match=r"line 1: expected a column answer, label, answers, got question_id, text"
    ):
        scored(name, [{"question_id": 1, "text": "?"}], answers("A"))
    row = {"question_id": 1, "text": "?", "answer": "yes" if name in ("pope", "mme") else "A", "choices": ["x", "y"]}
    if name in ("textvqa", "vizwiz", "vqav2"):
        row["answer"] = ["A"] * 10
    with pytest.raises(
        EvaluationError, match=r"no answer belongs to any of 1 questions: expected .* such as '1', got '5'"
    ):
        scored(name, [row], answers("A", first=5))
    with pytest.raises(EvaluationError, match=r"there are no answers$"):
        scored(name, [row], [])
    with pytest.raises(EvaluationError, match=r"line 1: not an answer: expected question_id and text, got question_id"):
        scored(name, [row], [{"question_id": 1}])
    for field in ("round_id", "options", "option_char", "metadata"):
        with pytest.raises(
            EvaluationError, match=f"line 1: not an answer: {field}='x', expected (int|list|dict) or none"
        ):
            scored(name, [row], [{"question_id": 1, "text": "A", field: "x"}])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(EvaluationError, match="the annotations have no questions"):
        scored(name, tmp_path / "empty.jsonl", answers("A"))


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("pope", {"label": "maybe"}, "label 'maybe', expected yes or no"),
        ("mme", {"answer": "true"}, "answer 'true', expected yes or no"),
        ("scienceqa", {"answer": 2, "choices": ["x", "y"]}, "answer '2', expected a letter A to B or a number 0 to 1"),
        ("textvqa", {"answer": "a"}, "question '0': one answer, expected answers of several people"),
        ("vizwiz", {"answers": ["a"]}, "question '0': one answer, expected answers of several people"),
        ("vqav2", {"answer": "a"}, "question '0': one answer, expected answers of several people"),
        ("mmbench", {"answer": "C", "A": "x", "B": "y"}, "answer 'C', expected the letter of one of 2 options"),
    ],
)
def test_wrong_annotations_are_told(scored: Scorer, name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        scored(name, [{"question_id": 0, "text": "?", **row}], answers("A"))


def test_an_unknown_benchmark_is_told(scored: Scorer) -> None:
    with pytest.raises(EvaluationError, match="benchmark 'popes': expected exact, gqa, mmbench"):
        scored("popes", [], [])
