"""The small trained model, and questions about its scenes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dpn_rt import LLM
from dpn_rt.builders.native import build_engine
from dpn_rt.evaluate.__main__ import main
from examples.tiny_dpn.export_questions import export

ROOT = Path(__file__).parents[2]
SCENES = 3


@dataclass(frozen=True)
class Tiny:
    """An engine of the small trained model, with questions."""

    engine: Path
    questions: Path
    images: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_lines(self.questions)

    def arguments(self, answers: Path, **changes: Any) -> list[str]:
        """Of `evaluate run`."""
        given = {"engine": self.engine, "question_file": self.questions, "image_folder": self.images}
        given |= {"answers_file": answers, "max_new_tokens": 8} | changes
        options = [(f"--{name.replace('_', '-')}", value) for name, value in given.items()]
        return [
            "run",
            "--quiet",
            *(str(word) for name, value in options for word in ([name] if value is True else [name, value])),
        ]


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    engine = build_engine(ROOT / "examples/tiny_dpn/checkpoint", folder / "engine", dtype="float32")
    return Tiny(engine.path, export(folder, SCENES), folder / "images")


@pytest.fixture(scope="package")
def llm(tiny: Tiny) -> LLM:
    return LLM(tiny.engine)


@pytest.fixture
def no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading an engine is a failure."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the engine is loaded")

    monkeypatch.setattr("dpn_rt.evaluate.engine_choice.LLM", load)


@pytest.fixture
def failing(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Runs a command that must fail with one line, and returns it."""

    def run(arguments: list[str]) -> str:
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        return captured.err.removeprefix("error: ").rstrip("\n")

    return run


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def without_times(path: Path) -> list[dict[str, Any]]:
    answers = read_lines(path)
    for answer in answers:
        del answer["metadata"]["seconds"]
    return answers
