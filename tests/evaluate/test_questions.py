"""Question files of every format, and the prompts that LLaVA's scripts make of them."""

from __future__ import annotations

import base64
import csv
import io
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpn_rt import LLM
from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.__main__ import main
from dpn_rt.evaluate.answers_file import AnswersFile
from dpn_rt.evaluate.asking import Run, answers_of
from dpn_rt.evaluate.images import ImageBytes, ImageFile
from dpn_rt.evaluate.question import PromptStyle, Question
from dpn_rt.evaluate.question_format import QuestionFormat
from dpn_rt.evaluate.readers.rows import BadRow
from dpn_rt.evaluate.settings import RunSettings
from dpn_rt.evaluate.source import QuestionSource, Scan
from tests.evaluate.conftest import Tiny, read_lines, write_lines
from tests.skips import NO_PARQUET

FOLDER = Path("images")
LETTER = "Answer with the option's letter from the given choices directly."


def questions(path: Path, style: PromptStyle | None = None) -> list[Question]:
    made = list(QuestionSource(path, FOLDER, style or PromptStyle()).questions())
    assert not any(isinstance(each, BadRow) for each in made), made
    return made  # type: ignore[return-value]


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(path: Path, columns: list[str], *rows: list[Any]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([columns, *rows])
    return path


def test_llavas_lines(tmp_path: Path) -> None:
    rows = [{"question_id": "x/1.png", "image": "1.jpg", "text": "What?\nAnswer.", "category": "count"}]
    rows.append({"question_id": 2, "text": "<image>\nNo picture?"})
    first, second = questions(write_lines(tmp_path / "q.jsonl", rows))
    assert (first.question_id, first.text, first.prompt, first.category) == (
        "x/1.png",
        "What?\nAnswer.",
        first.text,
        "count",
    )
    assert first.images == (ImageFile(FOLDER / "1.jpg"),) and first.round_id is None
    assert second.text == "No picture?" and second.images == ()
    (styled, _) = questions(tmp_path / "q.jsonl", PromptStyle(post_prompt="In a word.", single_pred_prompt=True))
    assert styled.text == f"What?\nAnswer.\nIn a word.\n{LETTER}"


def test_questions_of_one_id_and_other_texts_are_two(tmp_path: Path) -> None:
    rows = [{"question_id": "count/1.png", "image": "1.png", "text": text} for text in ("One?", "Two?")]
    assert len(questions(write_lines(tmp_path / "q.jsonl", rows))) == 2


def test_scienceqa(tmp_path: Path) -> None:
    human = {"from": "human", "value": "<image>\nWhich?\nA. x\nB. y"}
    items = [{"id": "4", "image": "4/image.png", "conversations": [human, {"from": "gpt", "value": "A"}]}]
    items.append({"id": "5", "conversations": [{"from": "human", "value": "Which?\nA. x"}]})
    path = tmp_path / "q.json"
    path.write_text(json.dumps(items))
    first, second = questions(path, PromptStyle(single_pred_prompt=True))
    assert first.text == f"Which?\nA. x\nB. y\n{LETTER}" and first.prompt == f"<image>\n{first.text}"
    assert second.prompt == second.text and second.images == () and first.question_id == "4"


def test_mmbench_in_rounds(tmp_path: Path) -> None:
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    path = write_table(
        tmp_path / "q.tsv",
        columns,
        ["7", "Which?", "A hint.", "red", "blue", "2", "", "B", "colors", base64.b64encode(png()).decode()],
        ["8", "two\nlines", "nan", "x", "None", "z", "", "A", "", base64.b64encode(png()).decode()],
    )
    first, second = questions(path, PromptStyle(single_pred_prompt=True))
    assert (first.question_id, first.round_id, first.category) == (7, 0, "colors")
    assert first.prompt == "A hint.\nWhich?\nA. red\nB. blue\nC. 2" and first.text == f"{first.prompt}\n{LETTER}"
    assert second.prompt == "two\nlines\nA. x", "LLaVA takes an option None as the end of the options"
    picture = first.images[0].open()
    assert isinstance(picture, Image.Image) and picture.size == (40, 30)
    rounds = questions(path, PromptStyle(all_rounds=True))[:3]
    assert [each.round_id for each in rounds] == [0, 1, 2]
    assert rounds[1].prompt == "A hint.\nWhich?\nA. blue\nB. 2\nC. red"
    assert rounds[1].options == ("blue", "2", "red") and rounds[1].letters == ("B", "C", "A")
    assert questions(path, PromptStyle(single_pred_prompt=True, lang="cn"))[0].text.endswith("\n请直接回答选项字母。")


def test_cells_that_name_the_row_of_their_image(tmp_path: Path) -> None:
    red, blue = (base64.b64encode(png(colour)).decode() for colour in ("red", "blue"))
    path = write_table(
        tmp_path / "q.tsv",
        ["index", "question", "image"],
        [1000241, "after", "241"],
        [241, "own", red],
        [7, "own", blue],
        [242, "before", "241"],
        [8, "before", "7"],
        [9, "a row that names another", "242"],
        [10, "no such row", "11"],
        [12, "a file", "12.png"],
    )
    made = list(QuestionSource(path, FOLDER).questions())
    colours = []
    for each in made:
        image = each.images[0].open() if isinstance(each, Question) else str(each)
        colours.append(image.getpixel((0, 0)) if isinstance(image, Image.Image) else image)
    wrong = "line {} (question_id {}): image {}: expected an image, or the index of a row that has one"
    first, second = (255, 0, 0), (0, 0, 255)
    assert colours == [
        first, first, second, first, second,
        wrong.format(7, 9, 242), wrong.format(8, 10, 11), FOLDER / "12.png",
    ]  # fmt: skip
    parts = [QuestionSource(path, FOLDER, num_chunks=3, chunk_idx=chunk) for chunk in range(3)]
    again = [each for part in parts for each in part.questions()]
    assert [str(each) for each in again] == [str(each) for each in made]


def test_seeds_choices_and_lists_of_choices_are_options(tmp_path: Path) -> None:
    rows = [{"question_id": 1, "question": "Which?", "choice_a": "x", "choice_b": "y", "image": "1.png"}]
    rows.append({"question_id": 2, "question": "Which?", "choices": ["p", "q"], "answer": 1})  # type: ignore[dict-item]
    prompts = [each.prompt for each in questions(write_lines(tmp_path / "q.jsonl", rows))]
    assert prompts == ["Which?\nA. x\nB. y", "Which?\nA. p\nB. q"]


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "own.csv",
        ["id", "question", "image", "answer"],
        [1, "Wie spät?", "uhr.jpg", "12"],
        ["007", "5", "a,b.png", "x"],
    )
    first, second = questions(path)
    assert (first.question_id, first.text, first.images) == (1, "Wie spät?", (ImageFile(FOLDER / "uhr.jpg"),))
    assert (second.question_id, second.text, second.images) == ("007", "5", (ImageFile(FOLDER / "a,b.png"),))


def test_a_row_with_too_few_cells_is_told(tmp_path: Path) -> None:
    path = write_table(tmp_path / "own.csv", ["id", "question"], [1, "?"], [2], [], [3, "?", "more"], [4, "?"])
    made = list(QuestionSource(path, FOLDER).questions())
    assert [type(each) for each in made] == [Question, BadRow, BadRow, Question]
    assert str(made[1]) == "line 3: 1 cells, expected 2 as the first line has"


def test_images_of_all_kinds(tmp_path: Path) -> None:
    encoded = base64.b64encode(png()).decode()
    values = [
        encoded,
        f"data:image/png;base64,{encoded}",
        {"bytes": None, "path": "a.png"},
        ["a.png", encoded],
        "noext",
    ]
    rows = [{"question_id": i, "text": "?", "image": value} for i, value in enumerate(values)]
    images = [each.images for each in questions(write_lines(tmp_path / "q.jsonl", rows))]
    assert [[type(image) for image in each] for each in images] == [
        [ImageBytes], [ImageBytes], [ImageFile], [ImageFile, ImageBytes], [ImageFile],
    ]  # fmt: skip
    for image in (images[0][0], images[1][0]):
        opened = image.open()
        assert isinstance(opened, Image.Image) and opened.size == (40, 30)


def test_bad_base64_is_an_image_error_of_its_row(tiny: Tiny, tmp_path: Path) -> None:
    rows = [tiny.rows[0], {**tiny.rows[1], "image": "!" * 200}, {**tiny.rows[2], "image": "A" * 200}]
    questions = write_lines(tmp_path / "q.jsonl", rows)
    assert main(tiny.arguments(tmp_path / "a.jsonl", question_file=questions)) == 3
    reasons = [row["reason"] for row in read_lines(tmp_path / "a.jsonl.skipped.jsonl")]
    assert "bad base64: another character among the digits" in reasons[0]
    assert reasons[1].startswith("image of line 3: not an image that can be read")


def test_images_are_opened_when_their_turn_comes(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the file, images of two batches are in memory at most."""
    opened: list[Path] = []

    def count(self: ImageFile) -> Path:
        opened.append(self.path)
        return self.path

    monkeypatch.setattr(ImageFile, "open", count)
    source, settings = QuestionSource(tiny.questions, tiny.images), RunSettings("e", max_new_tokens=8)
    ahead: list[int] = []
    scan = Scan.of(source)
    with AnswersFile(tmp_path / "a.jsonl", settings.to_json(), scan.places) as file:
        run = Run(QuestionFormat(settings, "tiny"), file, scan)
        for _ in answers_of(LLM(tiny.engine, max_num_seqs=2), source, [run]):
            ahead.append(len(opened) - len(ahead))
    assert len(ahead) == 30 and max(ahead) <= 2 * 2 + 1


def test_parquet_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EvaluationError) as raised:
        questions(tmp_path / "q.parquet")
    assert str(raised.value) == (
        f"{tmp_path / 'q.parquet'}: parquet needs the package pyarrow: in the repository, "
        "pip install --no-build-isolation -e '.[evaluate]'"
    )


ROWS = [{"question_id": str(i), "question": "?", "image": {"bytes": png(), "path": None}} for i in range(3)]


def test_parquet_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for pyarrow: what is used of it is `ParquetFile.iter_batches` and `to_pylist`."""

    class ParquetFile:
        def __init__(self, file: io.BufferedReader) -> None:
            if file.read() != b"PAR1":
                raise ArrowException("a library's words")

        def iter_batches(self, batch_size: int) -> Iterator[Any]:
            assert batch_size == 64
            yield types.SimpleNamespace(to_pylist=lambda: ROWS[:2])
            yield types.SimpleNamespace(to_pylist=lambda: ROWS[2:])

    class ArrowException(Exception):  # noqa: N818
        pass

    library = types.SimpleNamespace(ArrowException=ArrowException)
    monkeypatch.setitem(sys.modules, "pyarrow", library)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(ParquetFile=ParquetFile))  # type: ignore[arg-type]
    path = tmp_path / "q.parquet"
    path.write_bytes(b"PAR1")
    made = questions(path)
    assert [each.question_id for each in made] == ["0", "1", "2"] and made[2].place == "row 3"
    assert isinstance(made[0].images[0].open(), Image.Image)
    path.write_bytes(b"other")
    with pytest.raises(EvaluationError, match=r"q.parquet: no parquet file that can be read after row 0$"):
        questions(path)


def test_parquet_of_pyarrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason=NO_PARQUET)
    parquet = pytest.importorskip("pyarrow.parquet", reason=NO_PARQUET)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "q.parquet")
    assert [each.images[0].open().size for each in questions(tmp_path / "q.parquet")] == [(40, 30)] * 3  # type: ignore[union-attr]
    (tmp_path / "q.parquet").write_bytes(b"other")
    with pytest.raises(EvaluationError, match=r"q.parquet: no parquet file that can be read after row 0$"):
        questions(tmp_path / "q.parquet")
