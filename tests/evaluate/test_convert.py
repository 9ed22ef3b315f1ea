"""Files for servers, against the formats that LLaVA's scripts write."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openpyxl import load_workbook

from dpn_rt.evaluate.__main__ import main
from dpn_rt.evaluate.excel import xlsx
from tests.evaluate.conftest import write_lines


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., bytes]:
    def run(name: str, rows: list[dict[str, Any]] | Path, answers: list[dict[str, Any]], *parts: Path) -> bytes:
        questions = rows if isinstance(rows, Path) else write_lines(tmp_path / "questions.jsonl", rows)
        files = [write_lines(tmp_path / "answers.jsonl", answers), *parts]
        output = tmp_path / "new" / "upload"
        arguments = ["convert", name, "--question-file", str(questions), "--output", str(output)]
        assert main([*arguments, "--answers-file", *map(str, files)]) == 0
        return output.read_bytes()

    return run


def answer(question_id: int | str, text: str, **more: Any) -> dict[str, Any]:
    return {"question_id": question_id, "prompt": "?", "text": text, **more}


def test_vqav2(convert: Callable[..., bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question_id": i, "image": "x.jpg", "text": "?"} for i in (5, 6, 7)]
    part = write_lines(tmp_path / "part.jsonl", [answer(6, "Two dogs.")])
    made = json.loads(convert("vqav2", rows, [answer(5, "The Cat's, really?")], part))
    assert made == [
        {"question_id": 5, "answer": "cat 's really"},
        {"question_id": 6, "answer": "2 dogs"},
        {"question_id": 7, "answer": ""},
    ]
    assert "1 questions have no answer" in capsys.readouterr().err


def test_vizwiz(convert: Callable[..., bytes]) -> None:
    rows = [{"question_id": i, "image": f"VizWiz_test_{i}.jpg", "text": "?"} for i in (0, 1)]
    made = json.loads(convert("vizwiz", rows, [answer(1, "Unanswerable."), answer(0, "a basil")]))
    assert made == [
        {"image": "VizWiz_test_0.jpg", "answer": "basil"},
        {"image": "VizWiz_test_1.jpg", "answer": "unanswerable"},
    ]


def test_mmvet(convert: Callable[..., bytes]) -> None:
    rows = [{"question_id": i, "image": "x.jpg", "text": "?"} for i in (0, 1)]
    made = convert("mmvet", rows, [answer(0, "x é"), answer(1, "y\nz")])
    assert json.loads(made) == {"v1_0": "x é", "v1_1": "y\nz"}


def sheet(data: bytes) -> list[list[Any]]:
    return [list(row) for row in load_workbook(io.BytesIO(data)).active.values]


def test_mmbench(convert: Callable[..., bytes], tmp_path: Path) -> None:
    path = tmp_path / "test.tsv"
    columns = ["index", "question", "hint", "A", "B", "C", "D", "category", "image", "source", "l2-category", "split"]
    with path.open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(columns)
        table.writerow([7, "Which <one> & why?", "", "red", "blue", "", "", "c", "x" * 200, "s", "l", "test"])
        table.writerow([8, 'two\n"lines"', "h", "1", "2", "3", "4", "c", "x" * 200, "s", "l", "test"])
    lines = [answer(7, "A", round_id=0), answer(7, "B", round_id=1), answer(8, "D\x00é", round_id=0)]
    made = convert("mmbench", path, lines)
    assert sheet(made) == [
        ["index", "question", "A", "B", "C", "D", "prediction", "split"],
        [7, "Which <one> & why?", "red", "blue", None, None, "A", "test"],
        [8, 'two\n"lines"', 1, 2, 3, 4, "Dé", "test"],
    ]
    assert sheet(convert("mmbench", path, lines)) == sheet(made)


TEXTS = [
    "=1+1",
    '=HYPERLINK("http://x")',
    "+1",
    "@x",
    "-2",
    " a ",
    "\ttab",
    "_x0041_",
    "007",
    "1e5",
    "TRUE",
    "2026-01-01",
]


@pytest.mark.parametrize("text", [*TEXTS, "", "a\x01b\x0bc", "\ufffe", "é 你 😀"])
def test_a_text_in_an_excel_file_stays_a_text(text: str) -> None:
    rows = [{"answer": text, "index": 5}, {"answer": None}, {"index": True}]
    made = load_workbook(io.BytesIO(xlsx(["index", "answer"], rows)))
    header, *found = made.active.iter_rows()
    assert [cell.value for cell in header] == ["index", "answer"]
    assert found[0][0].value == 5 and found[0][0].data_type == "n"
    expected = {"a\x01b\x0bc": "abc", "": None, "\ufffe": None}.get(text, text)
    assert found[0][1].value == expected and found[0][1].data_type == ("s" if expected else "n")
    assert [cell.value for cell in found[1]] == [None, None]
    assert found[2][0].value == "True"


@pytest.mark.parametrize(
    ("name", "answers", "message"),
    [
        ("vizwiz", [answer(0, "x")], "VizWiz takes an answer to every question: 1 are missing: 1"),
        ("vqav2", [answer(0, "x"), answer(0, "y")], "question '0' has 2 answers: expected one"),
        ("pope", [answer(0, "x")], "benchmark 'pope': expected mmbench, mmvet, vizwiz, vqav2"),
    ],
)
def test_what_cannot_be_converted_is_told(
    failing: Callable[[list[str]], str], tmp_path: Path, name: str, answers: list[dict[str, Any]], message: str
) -> None:
    questions = write_lines(tmp_path / "q.jsonl", [{"question_id": i, "image": "x", "text": "?"} for i in (0, 1)])
    lines = write_lines(tmp_path / "a.jsonl", answers)
    arguments = ["convert", name, "--answers-file", str(lines), "--question-file", str(questions)]
    assert failing([*arguments, "--output", str(tmp_path / "upload.json")]) == message
    assert not (tmp_path / "upload.json").exists()


def test_an_output_that_cannot_be_written_is_told_first(failing: Callable[[list[str]], str], tmp_path: Path) -> None:
    arguments = ["convert", "vqav2", "--answers-file", "missing", "--question-file", "missing", "--output"]
    assert failing([*arguments, str(tmp_path)]).startswith(
        f"{tmp_path}: cannot be written there: expected a regular file"
    )
