"""What is wrong with questions, answers or options is told by name, and where possible before anything is computed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate import answers_file
from dpn_rt.evaluate.__main__ import main
from dpn_rt.evaluate.answers_file import AnswersFile
from dpn_rt.evaluate.source import QuestionSource, Scan
from tests.evaluate.conftest import Tiny, read_lines, without_times, write_lines

Failing = Callable[[list[str]], str]


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers to the first ten questions."""
    folder = tmp_path_factory.mktemp("whole")
    write_lines(folder / "q.jsonl", tiny.rows[:10])
    assert main(tiny.arguments(folder / "a.jsonl", question_file=folder / "q.jsonl")) == 0
    return folder / "a.jsonl"


def test_a_missing_image_is_skipped_and_comes_later(
    tiny: Tiny, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.rows[:10]
    rows[3]["image"] = "missing.png"
    questions, path = write_lines(tmp_path / "q.jsonl", rows), tmp_path / "a.jsonl"
    arguments = tiny.arguments(path, question_file=questions)
    assert main(arguments) == 3
    missing = tiny.images / "missing.png"
    reason = f"image '{missing}': no such file (expected a PIL image or the path of an image file)"
    skipped = Path(f"{path}.skipped.jsonl")
    assert read_lines(skipped) == [{"place": "line 4", "question_id": 3, "reason": reason}]
    errors = capsys.readouterr().err
    assert f"1 rows were skipped, listed in {skipped}" in errors and f"line 4 (question_id 3): {reason}" in errors
    assert len(read_lines(path)) == 9
    assert main(arguments) == 3, "it is still missing"
    missing.symlink_to(tiny.images / tiny.rows[3]["image"])
    assert main(arguments) == 0
    assert without_times(path) == without_times(whole) and not skipped.exists()
    missing.unlink()


def bad_lines(tiny: Tiny) -> tuple[list[str], list[tuple[str, Any, str]]]:
    """Lines of which the good ones are tiny's first four, and place, id and reason of the others."""
    good = [json.dumps(row) for row in tiny.rows[:4]]
    other = {**tiny.rows[0], "image": "scene_0001.png"}
    lines = [good[0], '{"question_id": 1, "image', good[1], "", "[1, 2]", json.dumps(other), good[2], "null", good[3]]
    lines += [json.dumps({"question_id": 9, "image": "scene_0000.png"}), json.dumps({"text": "?"})]
    lines += [
        json.dumps({"question_id": 11, "text": "x\ud83d"}),
        json.dumps({"question_id": 12, "text": "?", "image": 5}),
    ]
    lines += [json.dumps({"question_id": 3.5, "text": "?"}), json.dumps({"question_id": 14, "text": " "})]
    lines += [json.dumps({"question_id": None, "id": True, "text": "?"})]
    return lines, [
        ("line 2", None, "not JSON (truncated?): column 20 at '\"image'"),
        ("line 5", None, "expected an object with question_id, image and text, got list"),
        ("line 6", 0, "the same question_id and text as line 1"),
        ("line 8", None, "expected an object with question_id, image and text, got NoneType"),
        ("line 10", 9, "no question: expected a text in the column text or question, got question_id, image"),
        ("line 11", None, "no question_id: expected a column question_id, index, id, got text"),
        ("line 12", None, "the text 'x\\ud83d' has half of a surrogate pair, expected text that UTF-8 can hold"),
        ("line 13", 12, "image of line 13: expected the name of a file, base64 or bytes, got int"),
        ("line 14", None, "no question_id: expected a text or a whole number, got question_id=3.5"),
        ("line 15", 14, "no question: expected a text that is not empty, got text=' '"),
        ("line 16", None, "no question_id: expected a text or a whole number, got question_id=None, id=True"),
    ]


def test_bad_rows_are_skipped_by_name(
    tiny: Tiny, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, expected = bad_lines(tiny)
    questions, path = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main(tiny.arguments(path, question_file=questions)) == 3
    skipped = read_lines(Path(f"{path}.skipped.jsonl"))
    assert [(row["place"], row["question_id"], row["reason"]) for row in skipped] == expected
    assert without_times(path) == without_times(whole)[:4]
    assert "11 rows were skipped" in capsys.readouterr().err
    assert main(tiny.arguments(path, question_file=questions)) == 3, "nothing is open, and the rows are still bad"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", b'{"id": 1, "picture": "x"}\n', "none of its 1 rows is a question: line 1 (question_id 1): no "
         "question: expected a text in the column text or question, got id, picture"),
        ("q.jsonl", b"not json\nat all\n", "none of its 2 rows is a question: line 1: not JSON"),
        ("q.csv", b"name,answer\nx,y\n", "none of its 1 rows is a question: line 2: no question_id: expected a column "
         "question_id, index, id, got name, answer"),
        ("q.csv", b"", "expected a first line with names of columns, each once, got None"),
        ("q.tsv", b"index\tindex\n", "expected a first line with names of columns, each once, got ['index', 'index']"),
        ("q.csv", b"question_id,text\n1,caf\xe9\n", "has the byte 0xe9, expected a table saved as UTF-8"),
        ("q.json", b"{", "not JSON (truncated?): line 1, column 2"),
        ("q.json", b"5", "expected a list of questions, got int"),
        ("q.jsonl", b"\n\n", "has no rows, expected questions"),
        ("q.json", b"[]", "has no rows, expected questions"),
        ("q.csv", b"question_id,text\n", "has no rows, expected questions"),
        ("q.txt", b"", "expected a file whose name ends in .jsonl, .json, .csv, .tsv, .parquet"),
    ],
)  # fmt: skip
def test_a_file_without_questions_is_told(
    failing: Failing, tiny: Tiny, no_load: None, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    said = failing(tiny.arguments(tmp_path / "a.jsonl", question_file=tmp_path / name))
    assert said.startswith(f"{tmp_path / name}: {message}"), said
    assert not (tmp_path / "a.jsonl").exists()


def test_a_missing_question_file_is_told(failing: Failing, tiny: Tiny, no_load: None, tmp_path: Path) -> None:
    said = failing(tiny.arguments(tmp_path / "a.jsonl", question_file=tmp_path / "q.jsonl"))
    assert said == f"{tmp_path / 'q.jsonl'}: cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("kind", "message"),
    [("directory", "Is a directory"), ("below a file", "Not a directory"), ("pipe", "not a regular file"),
     ("long name", "File name too long")],
)  # fmt: skip
def test_an_answers_file_that_cannot_be_written_is_told_before_loading(
    failing: Failing, tiny: Tiny, no_load: None, tmp_path: Path, kind: str, message: str
) -> None:
    path = tmp_path / ("x" * 300 if kind == "long name" else "a.jsonl")
    if kind == "directory":
        path.mkdir()
    elif kind == "below a file":
        path = tiny.questions / "a.jsonl"
    elif kind == "pipe":
        os.mkfifo(path)
    assert failing(tiny.arguments(path)) == f"{path}: answers cannot be written there: {message}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 9}, "made with max_new_tokens=8, and this run has max_new_tokens=9"),
        ({"router_bias": 4}, "made with router_bias=None, and this run has router_bias=4.0"),
        ({"route": "2,2,2"}, "made with route=None, and this run has route=[2, 2, 2]"),
        (
            {"temperature": 1, "seed": 3},
            "made with temperature=0.0, top_p=None, seed=None, and this run has temperature=1.0,",
        ),
        ({"conv_mode": "llava_v1"}, "made with conv_mode=None, and this run has conv_mode=llava_v1"),
    ],
)
def test_answers_of_other_settings_are_refused(
    failing: Failing, tiny: Tiny, whole: Path, no_load: None, changes: dict[str, Any], message: str
) -> None:
    before = whole.read_bytes()
    said = failing(tiny.arguments(whole, question_file=whole.with_name("q.jsonl"), **changes))
    assert said.startswith(f"{whole}: line 1: its answer was {message}"), said
    assert said.endswith("expected another --answers-file") and whole.read_bytes() == before


def test_answers_of_another_engine_are_refused(
    failing: Failing, tiny: Tiny, whole: Path, no_load: None, tmp_path: Path
) -> None:
    lines = read_lines(whole)
    for line in lines:
        line["metadata"]["settings"]["engine"] = "0123456789abcdef"
    said = failing(tiny.arguments(write_lines(tmp_path / "a.jsonl", lines)))
    assert "line 1: its answer was made with engine=0123456789abcdef, and this run has engine=" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line["metadata"].pop("settings"), "line 2: an answer of another program"),
        (lambda line: line.pop("text"), "line 2: not an answer: expected metadata, prompt, question_id, text"),
        (
            lambda line: line.update(prompt="other"),
            "line 2: answers question 1, which is not among the questions, or has",
        ),
        (
            lambda line: line.update(question_id=0, prompt="What color is the background?"),
            "line 2: answers question 0 once more",
        ),
    ],
)
def test_other_answers_are_refused(
    failing: Failing, tiny: Tiny, whole: Path, no_load: None, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    lines = read_lines(whole)
    change(lines[1])
    assert message in failing(tiny.arguments(write_lines(tmp_path / "a.jsonl", lines)))


def test_a_broken_line_within_is_refused(
    failing: Failing, tiny: Tiny, whole: Path, no_load: None, tmp_path: Path
) -> None:
    lines = whole.read_bytes().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(lines[0] + lines[1][:30] + b"\n" + lines[2])
    assert failing(tiny.arguments(tmp_path / "a.jsonl")).startswith(
        f"{tmp_path / 'a.jsonl'}: line 2: not JSON (truncated?)"
    )


def test_a_file_of_another_run_is_left_alone(failing: Failing, tiny: Tiny, no_load: None, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = failing(tiny.arguments(path))
    assert said == f"{path}: another run is writing there: expected another --answers-file, or wait for it"


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Limits the size of files, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_run_goes_on_after_a_full_disk(
    failing: Failing, tiny: Tiny, whole: Path, tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    """The line that does not fit leaves nothing of itself."""
    path = tmp_path / "a.jsonl"
    arguments = tiny.arguments(path, question_file=whole.with_name("q.jsonl"))
    small_files(4000)
    said = failing(arguments)
    small_files(resource.RLIM_INFINITY)
    kept = path.read_bytes()
    assert said == (
        f"{path}: cannot be written: File too large; {len(kept.splitlines())} answers are kept: make room there, "
        "and the same command goes on"
    )
    assert 0 < len(kept) <= 4000 and kept.endswith(b"\n")
    assert main(arguments) == 0 and without_times(path) == without_times(whole)


def test_a_full_disk_is_named(
    failing: Failing, tiny: Tiny, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write, written = tmp_path / "a.jsonl", os.write, []

    def fail(file: int, data: memoryview) -> int:
        if len(written) == 3:
            write(file, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(data)
        return write(file, data)

    arguments = tiny.arguments(path, question_file=whole.with_name("q.jsonl"))
    with monkeypatch.context() as patched:
        patched.setattr(answers_file.os, "write", fail)
        said = failing(arguments)
    assert said == f"{path}: the disk is full; 3 answers are kept: make room there, and the same command goes on"
    assert path.read_bytes().count(b"\n") == 3 and path.read_bytes().endswith(b"\n")
    assert main(arguments) == 0 and without_times(path) == without_times(whole)


def test_a_full_disk_while_arranging_loses_nothing(
    failing: Failing, tiny: Tiny, whole: Path, no_load: None, tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(reversed(whole.read_bytes().splitlines(keepends=True))))
    before, arguments = path.read_bytes(), tiny.arguments(path, question_file=whole.with_name("q.jsonl"))
    small_files(2000)
    said = failing(arguments)
    small_files(resource.RLIM_INFINITY)
    assert "cannot be written: File too large; 10 answers are kept" in said
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]
    assert main(arguments) == 0 and path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_idx": 2, "num_chunks": 2}, "--chunk-idx 2 of --num-chunks 2: expected 0 to 1"),
        ({"num_chunks": 0}, "--num-chunks 0: expected at least 1"),
        ({"image_folder": "/nowhere"}, "--image-folder /nowhere: not a directory"),
        ({"score": "exact", "annotations": "/nowhere.jsonl"}, "/nowhere.jsonl: cannot be read: No such file"),
        ({"sweep": "router_bias=0,0.0"}, "--sweep 'router_bias=0,0.0': expected values that differ, some are equal"),
        ({"sweep": "bias=1,2"}, "--sweep 'bias=1,2': expected router_bias, route, reduce, = and values"),
        ({"sweep": "router_bias=1,x"}, "router_bias 'x': expected a number"),
        ({"sweep": "router_bias=1,1"}, "--sweep 'router_bias=1,1': expected values that differ, none of them empty"),
        ({"sweep": "route=1,2;a"}, "route 'a': expected experts separated by commas, such as 2,2,2 or 2,none,1"),
        ({"sweep": "reduce=a:b;a;b"}, None),
        ({"sweep": "router_bias=0,4", "router_bias": 2}, "--sweep router_bias with router_bias=2.0: expected one of "),
        ({"sweep": "route=2,2,2", "route": "0,0,0"}, "--sweep route with route=(0, 0, 0): expected one of the two"),
        ({"annotations": "/nowhere.jsonl"}, "--annotations /nowhere.jsonl: expected --score as well"),
        ({"route": "x"}, "route 'x': expected experts separated by commas, such as 2,2,2 or 2,none,1"),
        ({"temperature": -1}, "temperature=-1.0: expected"),
        ({"max_new_tokens": 0}, "max_tokens=0: expected"),
        ({"score": "popes"}, "benchmark 'popes': expected exact, gqa"),
        ({"conv_mode": "mpt"}, "--conv-mode mpt: expected vicuna_v1, v1, llava_v1, or none"),
        ({"engine": "/nowhere"}, "/nowhere: not an engine directory"),
    ],
)
def test_wrong_options_are_told_before_loading(
    failing: Failing, tiny: Tiny, no_load: None, tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    if message is None:
        changes = {"sweep": "reduce=a:b;a-b"}
        message = f"--sweep: two values would write {tmp_path / 'a.reduce=a-b.jsonl'}"
    assert failing(tiny.arguments(tmp_path / "a.jsonl", **changes)).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"route": "2,2"}, "route=(2, 2): expected a list of 3 experts, one per boundary"),
        ({"router_bias": 5000}, "router_bias=5000.0: expected a number from -1000 to 1000"),
        ({"reduce": "fastv:k=2,ratio=0.5"}, "reduce"),
    ],
)
def test_settings_that_the_engine_cannot_take_are_told_once(
    failing: Failing, tiny: Tiny, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert failing(tiny.arguments(tmp_path / "a.jsonl", **changes)).startswith(message)
    assert not (tmp_path / "a.jsonl").exists()


def test_an_empty_file_that_another_run_has_is_left_alone(
    failing: Failing, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be made by a run that fails, and found by one that goes on."""
    path = tmp_path / "a.jsonl"

    def found(source: QuestionSource) -> Scan:
        nonlocal other
        other = AnswersFile(path, {}, {})
        raise EvaluationError("fails")

    other: AnswersFile | None = None
    monkeypatch.setattr(Scan, "of", found)
    assert failing(tiny.arguments(path)) == "fails"
    assert other is not None and path.read_bytes() == b""
    with other:
        pass
    assert failing(tiny.arguments(path)) == "fails" and path.exists(), "it was there before the run"


def test_a_file_that_another_run_has_just_arranged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers to the file that is no longer there would be lost."""
    path = tmp_path / "a.jsonl"
    lock = fcntl.flock

    def locked(file: int, operation: int) -> None:
        (tmp_path / "new").write_bytes(b"")
        (tmp_path / "new").rename(path)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", locked)
    with pytest.raises(EvaluationError, match="another run has just ended there: expected the same command again"):
        AnswersFile(path, {}, {})
