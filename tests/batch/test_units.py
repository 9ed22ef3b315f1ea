"""Rows, options and ids, without a cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from dpn_rt import DpnError
from dpn_rt.batch import answer_parquet, build_processor
from dpn_rt.batch.answering import Answerer
from dpn_rt.batch.options import AnswerOptions
from examples.tiny_dpn import data
from tests.batch.conftest import PARAMS, png


def test_images_of_all_forms_and_what_is_wrong_with_a_row(engine_dir: Path, tmp_path: Path) -> None:
    image = data.sample("test", 0).image
    image.save(tmp_path / "scene.png")
    forms: list[Any] = [
        {"bytes": png(image), "path": None},
        {"bytes": None, "path": str(tmp_path / "scene.png")},
        {"bytes": b"no image", "path": None},
        {"bytes": None, "path": str(tmp_path / "missing.png")},
        None,
    ]
    table = pa.table({"image": pa.array(forms), "question": ["What color is the background?"] * 5, "id": list("abcde")})
    answerer = Answerer(AnswerOptions(engine_dir, PARAMS))
    rows = answerer(table).to_pylist()
    assert [row["id"] for row in rows] == list("abcde")
    assert rows[0]["answer"] == rows[1]["answer"] and rows[0]["error"] is None and rows[0]["visual_tokens"]
    assert rows[2]["answer"] is None and "image" in rows[2]["error"]
    assert rows[3]["answer"] is None and "missing.png" in rows[3]["error"]
    assert rows[4]["answer"] and not rows[4]["visual_tokens"][0]
    in_paths = pa.table({"image": [str(tmp_path / "scene.png")], "question": ["What color is the background?"]})
    assert answerer(in_paths)["answer"].to_pylist() == [rows[0]["answer"]]
    in_bytes = pa.table({"image": [png(image)], "question": ["What color is the background?"]})
    assert answerer(in_bytes)["answer"].to_pylist() == [rows[0]["answer"]]
    with pytest.raises(DpnError, match="'question'"):
        answerer(pa.table({"image": [b""], "text": ["?"]}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"actors": 0}, "actors=0"),
        ({"actors": (3, 2)}, r"actors=\(3, 2\)"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"cpus_per_actor": -1}, "cpus_per_actor=-1: expected a number, 0 or more"),
        ({"gpus_per_actor": float("nan")}, "gpus_per_actor=nan: expected a number"),
    ],
)
def test_wrong_numbers_are_told(engine_dir: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DpnError, match=words):
        build_processor(engine_dir, **options)


def test_a_folder_without_an_engine_is_told(tmp_path: Path) -> None:
    with pytest.raises(DpnError, match=r"engine\.json"):
        build_processor(tmp_path)


@pytest.mark.parametrize(("ids", "words"), [([1, 2, 2], "id=2"), ([1, None, 3], "id=None")])
def test_ids_must_tell_rows_apart(engine_dir: Path, tmp_path: Path, ids: list[int | None], words: str) -> None:
    path = tmp_path / "questions.parquet"
    pa.parquet.write_table(pa.table({"id": ids, "image": [None] * 3, "question": ["?"] * 3}), path)
    processor = build_processor(engine_dir)
    with pytest.raises(DpnError, match=words):
        answer_parquet(path, tmp_path / "job", processor)
    with pytest.raises(DpnError, match="no column 'key'"):
        answer_parquet(path, tmp_path / "job", processor, id_column="key")
    assert not (tmp_path / "job").exists()


def test_tasks_that_read_and_write_load_no_torch() -> None:
    """Ray runs each in a process, which imports the module of the task's function."""
    modules = "dpn_rt.batch.parquet", "dpn_rt.evaluate.ray_questions"
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
