"""Answers are scored against annotations that a test gives as values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpn_rt.evaluate import score
from dpn_rt.evaluate.scorers.benchmark import Score
from tests.evaluate.conftest import write_lines

Scorer = Callable[..., Score]


@pytest.fixture
def scored(tmp_path: Path) -> Scorer:
    """Scores answers against annotations that are given as values."""

    def run(
        name: str, annotations: Any, answers: list[dict[str, Any]], file: str = "annotations.jsonl", **options: Any
    ) -> Score:
        path = tmp_path / file
        if isinstance(annotations, Path):
            path = annotations
        elif path.suffix == ".jsonl":
            write_lines(path, annotations)
        else:
            path.write_text(json.dumps(annotations), encoding="utf-8")
        return score(name, write_lines(tmp_path / "answers.jsonl", answers), path, **options)

    return run


def answers(*texts: str, first: int = 0, prompt: str = "") -> list[dict[str, Any]]:
    return [{"question_id": first + i, "prompt": prompt, "text": text} for i, text in enumerate(texts)]
