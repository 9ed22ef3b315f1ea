"""Tables, plots and the page of scored answers files."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpn_rt.evaluate.__main__ import main
from dpn_rt.evaluate.reports.samples import differing
from dpn_rt.evaluate.reports.summary import RunSummary, routes_by_category, summarize
from dpn_rt.evaluate.reports.tables import markdown_table
from dpn_rt.evaluate.scorers.table import benchmark
from dpn_rt.evaluate.scorers.truth import Truth, read_answers
from tests.evaluate.conftest import Tiny, write_lines

Failing = Callable[[list[str]], str]
FASTV = "fastv:k=2,ratio=0.5"
TRUTHS = [
    Truth((str(i),), (answer,), category=kind) for i, (answer, kind) in enumerate([("a", "x"), ("b", "x"), ("c", "y")])
]


def line(number: int, text: str, settings: dict[str, Any], tokens: list[int], **trace: Any) -> dict[str, Any]:
    seconds = {"queue": 1.0, "first_token": 1.5, "total": 2.0}
    trace = {
        "settings": settings,
        "visual_tokens": tokens,
        "flops": tokens[-1],
        "dense_flops": 16,
        "seconds": seconds,
    } | trace
    return {"question_id": number, "prompt": f"q{number}", "text": text, "metadata": trace}


def summary(folder: Path, name: str, lines: list[dict[str, Any]]) -> RunSummary:
    path = write_lines(folder / f"{name}.jsonl", lines)
    return summarize(path, benchmark("exact").score(TRUTHS, read_answers(path)))


def test_a_summary_by_hand(tmp_path: Path) -> None:
    settings = {"engine": "e", "reduce": f"pool:kernel=2x2,layer=0+{FASTV}"}
    run = summary(
        tmp_path,
        "run",
        [line(0, "a", settings, [16, 8]), line(1, "x", settings, [16, 4]), line(2, "c", settings, [16, 4])],
    )
    assert (run.name, run.method, run.setting) == ("run", "pool+fastv", settings["reduce"])
    assert run.value == pytest.approx(200 / 3) and run.flops == pytest.approx(16 / 3)
    assert run.flops_ratio == pytest.approx((8 + 4 + 4) / 48) and run.visual_tokens == (16, pytest.approx(16 / 3))
    assert run.first_token == pytest.approx(0.5), "the wait for a place does not count"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("as built", "")),
        ({"router_bias": 4.0}, ("router bias", "router_bias=4")),
        ({"route": [2, None]}, ("forced route", "2,none")),
        ({"reduce": "none"}, ("none", "none")),
    ],
)
def test_methods(tmp_path: Path, settings: dict[str, Any], expected: tuple[str, str]) -> None:
    run = summary(tmp_path, "run", [line(0, "a", settings, [16, 8])])
    assert (run.method, run.setting) == expected


def test_routes_by_kind(tmp_path: Path) -> None:
    routes = [["1x1", None], ["1x1", None], ["2x2", "2x2"]]
    run = summary(tmp_path, "run", [line(i, "a", {}, [16, 4], route=route) for i, route in enumerate(routes)])
    assert routes_by_category(run) == {"x": {"1x1 skipped": 2}, "y": {"2x2 2x2": 1}}


def test_llavas_answers_have_no_costs(tmp_path: Path) -> None:
    run = summary(tmp_path, "run", [{"question_id": 0, "prompt": "q0", "text": "a", "metadata": {}}])
    assert (run.flops, run.flops_ratio, run.visual_tokens, run.first_token) == (None, None, (), None)


def test_samples_that_differ(tmp_path: Path) -> None:
    """One that only one run has right comes first; equal answers do not come."""
    first = summary(tmp_path, "first", [line(i, text, {}, [16, 8]) for i, text in enumerate(("a", "x", "c"))])
    second = summary(tmp_path, "second", [line(i, text, {}, [16, 8]) for i, text in enumerate(("a", "y", "z"))])
    assert [sample.question_id for sample in differing(first, second)] == ["2", "1"]


def test_cells_of_markdown_are_escaped() -> None:
    assert markdown_table(["a|b"], [["x\ny|"]]) == "| a\\|b |\n| --- |\n| x y\\| |"


@pytest.fixture(scope="module")
def answers(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sweep")
    assert main([*tiny.arguments(folder / "a.jsonl"), "--sweep", "router_bias=0,32", "--sweep", "route=2,2,2"]) == 0
    return sorted(folder.glob("a*.jsonl"))


class Page(HTMLParser):
    """What a page refers to, and whether its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("img", "br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def arguments(tiny: Tiny, answers: list[Path], output: Path) -> list[str]:
    given = ["report", "exact", "--question-file", str(tiny.questions), "--output", str(output), "--answers-file"]
    return [*given, *map(str, answers)]


def test_a_report(tiny: Tiny, answers: list[Path], tmp_path: Path) -> None:
    html = ["--html", "--engine", str(tiny.engine), "--image-folder", str(tiny.images), "--most", "3"]
    assert main([*arguments(tiny, answers, tmp_path / "new" / "report"), *html]) == 0
    folder = tmp_path / "new" / "report"
    plots = ["accuracy_flops.png", "accuracy_time.png", "routes.png", "visual_tokens.png"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*plots, "report.md", "report.html", "runs.csv", "questions.csv"]
    )
    for name in plots:
        with Image.open(folder / name) as picture:
            assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 24) or ()) > 5
    text = (folder / "report.md").read_text()
    assert text.startswith("# exact match\n") and all(f"({name})" in text for name in plots)
    assert "| a.route=2,2,2 | forced route | 2,2,2 | 30 | 0 |" in text and "Routes of a.router_bias=0" in text
    runs = list(csv.DictReader(io.StringIO((folder / "runs.csv").read_text())))
    assert [run["setting"] for run in runs] == ["2,2,2", "router_bias=0", "router_bias=32"]
    assert float(runs[0]["flops_ratio"]) < float(runs[1]["flops_ratio"]) <= 1
    questions = list(csv.DictReader(io.StringIO((folder / "questions.csv").read_text())))
    assert len(questions) == 90 and questions[0]["route"] == "2x2 2x2 2x2"
    right = [float(question["points"]) for question in questions if question["run"] == "a.router_bias=0"]
    assert float(runs[1]["accuracy"]) == pytest.approx(100 * sum(right) / 30)
    page = Page((folder / "report.html").read_text())
    assert page.open == [] and len(page.sources) == 4 + 3 * 3
    assert all(source.startswith("data:image/") for source in page.sources), "it needs no other file"
    assert re.search(r"Where a.route=2,2,2 and a.router_bias=0 differ: \d+ questions", page.text)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main([*arguments(tiny, answers, folder), *html]) == 0
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_texts_on_the_page_are_texts(tiny: Tiny, answers: list[Path], tmp_path: Path) -> None:
    evil = "<script>alert('1')</script>"
    rows = tiny.rows
    rows[0] |= {"text": f"{evil}?", "category": evil, "image": f"{evil}.png"}
    questions = write_lines(tmp_path / "q.jsonl", rows[:1])
    files = []
    for number in range(2):
        line = {"question_id": 0, "prompt": f"{evil}?", "text": f"{evil}{number}", "metadata": {"category": evil}}
        files.append(str(write_lines(tmp_path / f"{evil.replace('/', '')}{number}.jsonl", [line])))
    command = ["report", "exact", "--question-file", str(questions), "--output", str(tmp_path / "out"), "--html"]
    assert main([*command, "--engine", str(tiny.engine), "--answers-file", *files]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>" not in page and page.count("&lt;script&gt;") >= 6 and "no such file" in page


def test_without_matplotlib_tables_are_written(
    tiny: Tiny, answers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(arguments(tiny, answers, tmp_path)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["questions.csv", "report.md", "runs.csv"]
    assert (
        "note: no plots: a plot needs the package matplotlib: in the repository, pip install" in capsys.readouterr().err
    )


def test_wrong_options_are_told(failing: Failing, tiny: Tiny, answers: list[Path], tmp_path: Path) -> None:
    command = arguments(tiny, answers, tmp_path / "out")
    assert failing([*command, "--html"]) == "--html: expected --engine and --question-file too, for the pictures"
    assert failing([*command, "--compare", str(answers[0]), str(answers[1])]) == "--compare: expected --html as well"
    html = [*command, "--html", "--engine", str(tiny.engine), "--compare", str(answers[0]), "other.jsonl"]
    assert failing(html) == "--compare other.jsonl: expected files of --answers-file"
    assert failing(["report", "exact", "--output", str(tmp_path), "--answers-file", str(answers[0])]) == (
        "no right answers: expected --annotations, or a --question-file that has them"
    )
    in_a_file = arguments(tiny, answers, tiny.questions)
    assert "report.md: cannot be written there: expected a regular file in a directory" in failing(in_a_file)
    assert not (tmp_path / "out").exists()
