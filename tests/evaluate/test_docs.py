"""What docs/evaluate.md promises for a table of one's own runs as printed; its commands have options that exist."""

from __future__ import annotations

import csv
import re
import runpy
import shlex
from pathlib import Path

import pytest

from dpn_rt.evaluate.__main__ import _parser, main
from dpn_rt.evaluate.scorers.table import BENCHMARKS
from dpn_rt.evaluate.submissions import SUBMISSIONS
from tests.evaluate.conftest import ROOT, Tiny

DOCS = (ROOT / "docs/evaluate.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return [content for name, content in re.findall(r"^```(\w*)\n(.*?)^```$", DOCS, re.M | re.S) if name == kind]


def commands() -> list[list[str]]:
    lines = [line for block in blocks("") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line.partition("  #")[0]) for line in lines if line.startswith("python -m dpn_rt.evaluate ")]
    return [line[3:] for line in words]


@pytest.fixture
def own_table(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "own.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question_id", "image", "text", "answer"])
        writer.writerows([row[name] for name in ("question_id", "image", "text", "answer")] for row in tiny.rows[:10])
    (tmp_path / "engine").symlink_to(tiny.engine)
    (tmp_path / "pictures").symlink_to(tiny.images)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own_table")
def test_ten_rows_take_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [line for line in commands() if "own.csv" in line and line[0] == "run"]
    assert main([*command, "--max_new_tokens", "8"]) == 0
    assert re.search(r"accuracy +\d+\.\d\d", capsys.readouterr().out)


@pytest.mark.usefixtures("own_table")
def test_ten_rows_take_five_lines_of_python(capsys: pytest.CaptureFixture[str]) -> None:
    program = next(block for block in blocks("python") if "own.csv" in block)
    assert len(program.splitlines()) <= 5
    Path("program.py").write_text(program)
    runpy.run_path("program.py")
    assert re.fullmatch(r"\{'accuracy': \d+\.0\}\n", capsys.readouterr().out)


def test_commands_have_options_that_exist() -> None:
    parser, lines = _parser(), commands()
    assert {line[0] for line in lines} >= {"run", "score", "report"} and len(lines) >= 6
    for line in lines:
        given = [word for word in line if word != "..."]
        needed = {"--engine": "e", "--question-file": "q", "--answers-file": "a"} if line[0] == "run" else {}
        more = [word for name, value in needed.items() if name not in given for word in (name, value)]
        parser.parse_args([*given, *more])


@pytest.mark.parametrize("name", [*BENCHMARKS, *SUBMISSIONS])
def test_every_benchmark_is_named(name: str) -> None:
    assert re.search(rf"`{name}`|convert [\w|]*\b{name}\b", DOCS)
