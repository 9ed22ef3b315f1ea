"""Rows, options and ids, without a cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from dpn_rt import DpnError, SamplingParams
from dpn_rt.batch import answer_parquet, build_processor, read_answers
from dpn_rt.batch.answer_schema import ANSWER_SCHEMA
from dpn_rt.batch.answering import Answerer
from dpn_rt.batch.options import AnswerOptions
from dpn_rt.errors import RequestError
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


def test_a_row_that_fails_leaves_the_others_their_answers(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of one row overflow."""
    answerer = Answerer(AnswerOptions(engine_dir, PARAMS))
    engine = answerer._llm.engine
    sample = engine._sample

    def overflowing(sequences: Any, logits: torch.Tensor, best: Any = None) -> Any:
        logits = logits.clone()
        for row, sequence in enumerate(sequences):
            if sequence.request_id == "1":
                logits[row] = float("nan")
        return sample(sequences, logits, None)

    monkeypatch.setattr(engine, "_sample", overflowing)
    rows = answerer(pa.table({"image": [None] * 3, "question": ["What color is the background?"] * 3})).to_pylist()
    assert rows[0]["answer"] and rows[0]["answer"] == rows[2]["answer"]
    assert rows[1]["answer"] is None and "not finite" in rows[1]["error"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"actors": 0}, "actors=0"),
        ({"actors": (3, 2)}, r"actors=\(3, 2\)"),
        ({"actors": (1, 2, 3)}, r"actors=\(1, 2, 3\)"),
        ({"actors": "2"}, "actors='2'"),
        ({"actors": 1.5}, r"actors=1\.5"),
        ({"batch_size": 2.0}, r"batch_size=2\.0"),
        ({"cpus_per_actor": float("nan")}, "cpus_per_actor=nan"),
        ({"cpus_per_actor": "2"}, "cpus_per_actor='2'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"cpus_per_actor": -1}, "cpus_per_actor=-1: expected a number, 0 or more"),
        ({"gpus_per_actor": float("nan")}, "gpus_per_actor=nan: expected a number"),
    ],
)
def test_wrong_numbers_are_told(engine_dir: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DpnError, match=words):
        build_processor(engine_dir, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"actors": (1, 2)}, False),
        ({"actors": 3, "copy_weights": None}, False),
        ({"actors": 3, "copy_weights": True}, True),
    ],
)
def test_several_engines_share_the_file_of_weights(
    engine_dir: Path, options: dict[str, Any], expected: bool | None
) -> None:
    assert build_processor(engine_dir, **options).answers.llm_options == {"copy_weights": expected}


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


def questions(path: Path, **columns: Any) -> Path:
    """A file of three questions without images; None leaves a column out."""
    given = {"id": [1, 2, 3], "image": pa.nulls(3, pa.binary()), "question": ["?", "??", "???"], **columns}
    pa.parquet.write_table(pa.table({name: value for name, value in given.items() if value is not None}), path)
    return path


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        ({"answer": ["a", "b", "c"], "error": ["", "", ""]}, {}, "has columns answer, error, which the answers get"),
        ({"question": None}, {}, "no column 'question', expected one of id, image"),
        ({"image": None}, {}, "no column 'image', expected one of id, question"),
        ({"question": [1, 2, 3]}, {}, r"column 'question' is int64, expected texts"),
        ({"id": [[1], [2], [3]]}, {}, r"column 'id' is list<.*>, expected ids that are whole numbers or texts"),
        ({"id": [0.5, 1.5, 2.5]}, {}, r"column 'id' is double, expected ids"),
        ({"image": [b"1", b"2", b"3"]}, {"id_column": "image"}, "column 'image' has the images"),
        ({}, {"rows_per_file": 0}, "rows_per_file=0: expected a whole number of at least 1"),
        ({}, {"rows_per_file": "9"}, "rows_per_file='9': expected a whole number of at least 1"),
    ],
)
def test_tables_whose_answers_would_have_no_place(
    engine_dir: Path, tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    """All of it is told before an engine is loaded."""
    path = questions(tmp_path / "questions.parquet", **columns)
    with pytest.raises(RequestError, match=words):
        answer_parquet(path, tmp_path / "job", build_processor(engine_dir), **options)
    assert not (tmp_path / "job").exists()


def test_a_pipeline_that_names_a_column_as_the_answers_do(engine_dir: Path) -> None:
    answerer = Answerer(AnswerOptions(engine_dir, PARAMS))
    with pytest.raises(RequestError, match="has columns route"):
        answerer(pa.table({"image": [b""], "question": ["?"], "route": ["66"]}))
    with pytest.raises(RequestError, match="columns image stand more than once"):
        answerer(
            pa.Table.from_arrays([pa.array([b""]), pa.array([b""]), pa.array(["?"])], ["image", "image", "question"])
        )


def test_questions_that_cannot_be_read(engine_dir: Path, tmp_path: Path) -> None:
    processor = build_processor(engine_dir)
    whole = questions(tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    (tmp_path / "text.parquet").write_text("id,question")
    (tmp_path / "empty").mkdir()
    for name, words in {
        "missing.parquet": "no such file or folder",
        "cut.parquet": "not a parquet file, damaged, or with two columns of one name",
        "text.parquet": "not a parquet file, damaged, or with two columns of one name",
        "empty": "has no files",
    }.items():
        with pytest.raises(RequestError, match=f"{name}: {words}, expected parquet files$"):
            answer_parquet(tmp_path / name, tmp_path / "job", processor)
        with pytest.raises(RequestError, match=f"{name}: {words}, expected parquet files$"):
            read_answers(tmp_path / name, tmp_path / "job")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    questions(mixed / "a.parquet")
    questions(mixed / "b.parquet", id=["1", "2", "x"])
    with pytest.raises(RequestError, match=r"b\.parquet is damaged, or its columns are not those of the other files"):
        answer_parquet(mixed, tmp_path / "job", processor)
    assert not (tmp_path / "job").exists()


def test_a_job_without_questions(engine_dir: Path, tmp_path: Path) -> None:
    path, job = tmp_path / "questions.parquet", tmp_path / "job"
    table = pa.table(
        {"image": pa.array([], pa.binary()), "id": pa.array([], pa.int64()), "question": pa.array([], "str")}
    )
    pa.parquet.write_table(table, path)
    answer_parquet(path, job, build_processor(engine_dir))
    answers = read_answers(path, job)
    assert len(answers) == 0 and answers.column_names == ["id", "question", *ANSWER_SCHEMA.names]


def test_folders_that_are_no_jobs(engine_dir: Path, tmp_path: Path) -> None:
    path, processor = questions(tmp_path / "questions.parquet"), build_processor(engine_dir)
    with pytest.raises(RequestError, match=r"questions\.parquet: answers cannot be written there: "):
        answer_parquet(path, path, processor)
    for number, (text, words) in enumerate(
        {"{": "not JSON", "[]": "not the settings of a job", "\xff": "not JSON"}.items()
    ):
        job = tmp_path / f"job{number}"
        job.mkdir()
        (job / "settings.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(RequestError, match=rf"settings\.json: {words}"):
            answer_parquet(path, job, processor)
        assert (job / "settings.json").read_bytes() == text.encode("latin-1")


def test_a_job_goes_on_with_other_actors_and_other_memory(engine_dir: Path, tmp_path: Path) -> None:
    """But not with what changes an answer."""
    path, job = questions(tmp_path / "questions.parquet", question=["?"] * 3), tmp_path / "job"
    answered = job / "answers" / "a.parquet"
    answered.parent.mkdir(parents=True)
    pa.parquet.write_table(pa.table({"id": [1, 2, 3], "question": ["?"] * 3}), answered)
    answer_parquet(path, job, build_processor(engine_dir))
    for options in ({"actors": 2}, {"max_num_seqs": 2}, {"kv_cache_bytes": 2**24, "copy_weights": False}):
        answer_parquet(path, job, build_processor(engine_dir, **options))
    for options, words in (
        ({"max_model_len": 100}, "has answers of max_model_len=None, expected max_model_len=100"),
        ({"limit_mm_per_prompt": {"image": 1}}, r"expected limit_mm_per_prompt=\{'image': 1\}"),
        ({"sampling_params": SamplingParams(temperature=0, max_tokens=7)}, "max_tokens"),
        ({"route": (1, None, None)}, r"route=None, expected route=\[1, None, None\]"),
        ({"question_column": "question", "image_column": "picture"}, "image"),
    ):
        with pytest.raises(DpnError, match=words):
            answer_parquet(path, job, build_processor(engine_dir, **options))


def test_answers_to_other_questions_of_the_same_ids(engine_dir: Path, tmp_path: Path) -> None:
    """They are not taken for those of questions that were changed, or of another file."""
    path, job, processor = tmp_path / "questions.parquet", tmp_path / "job", build_processor(engine_dir)
    answered = job / "answers" / "a.parquet"
    answered.parent.mkdir(parents=True)
    pa.parquet.write_table(pa.table({"id": [1, 2, 3], "question": ["?", None, "???"]}), answered)
    questions(path, question=["?", None, "???"])
    answer_parquet(path, job, processor)  # they are the same
    questions(path, question=["?", None, "other"])
    with pytest.raises(RequestError, match=r"id=3 was answered when question was '\?\?\?', and it is 'other'"):
        answer_parquet(path, job, processor)
    questions(path, id=["1", "2", "3"])
    with pytest.raises(RequestError, match="answers whose id is int64, and that of .* is string"):
        answer_parquet(path, job, processor)
    answered.write_bytes(answered.read_bytes()[:-9])
    for call in (lambda: answer_parquet(path, job, processor), lambda: read_answers(path, job)):
        with pytest.raises(RequestError, match=r"answers in .*answers: not a parquet file, damaged"):
            call()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_num_seq": 4}, "no argument 'max_num_seq': expected one of LLM's, device, max_num_seqs"),
        ({"max_image_pixels": 4}, "no argument 'max_image_pixels'"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"reduce": "fastv:k=2,ratio=0.5"}, "the model has a trained reduction of its own"),
        ({"route": (9, 9, 9)}, r"route\[0\]=9"),
        ({"router_bias": 10**400}, "router_bias="),
        ({"sampling_params": SamplingParams(n=2)}, "sampling_params.n=2: expected 1"),
        ({"sampling_params": {"max_tokens": 3}}, "sampling_params={'max_tokens': 3}: expected SamplingParams"),
    ],
)
def test_what_no_row_could_be_answered_with(engine_dir: Path, options: dict[str, Any], words: str) -> None:
    """Told here: in an actor of Ray it would be told again and again, or for each row."""
    with pytest.raises(DpnError, match=words):
        build_processor(engine_dir, **options)


def test_tasks_that_read_and_write_load_no_torch() -> None:
    """Ray runs each in a process, which imports the module of the task's function."""
    modules = "dpn_rt.batch.parquet", "dpn_rt.evaluate.ray_questions"
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
