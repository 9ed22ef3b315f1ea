"""Batches on Ray Data: the answers of one engine, each question once, whatever is killed."""

from __future__ import annotations

import fcntl
import io
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
import ray

from dpn_rt import LLM, DpnError, SamplingParams
from dpn_rt.batch import answer_parquet, build_processor, read_answers
from dpn_rt.batch.answering import ANSWER_SCHEMA, Answerer
from dpn_rt.batch.options import AnswerOptions
from dpn_rt.builders.native import build_engine
from dpn_rt.outputs import RequestOutput
from examples.answer_parquet import main as answer_parquet_example
from examples.tiny_dpn import data
from tests.ray_cluster import ray_cluster

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny_dpn" / "checkpoint"
ROWS = 60
PARAMS = SamplingParams(temperature=0, max_tokens=6, logprobs=0)


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(CHECKPOINT, tmp_path_factory.mktemp("batch") / "tiny", dtype="float32").path


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of questions whose ids are in no order."""
    ids = random.sample(range(10_000), ROWS)
    rows = []
    for number, row_id in enumerate(ids):
        scene = data.sample("test", number // 5)
        rows.append(
            {"id": row_id, "image": png(scene.image), "question": scene.questions[number % 10].text, "n": number}
        )
    path = tmp_path_factory.mktemp("questions") / "questions.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def expected(engine_dir: Path, questions: Path) -> list[RequestOutput]:
    """What one engine answers to each question alone."""
    answerer = Answerer(AnswerOptions(engine_dir, PARAMS))
    llm = LLM(engine_dir)
    rows = pa.parquet.read_table(questions).to_pylist()
    return [llm.generate([lambda row=row: answerer._prompt(row)], PARAMS, use_tqdm=False)[0] for row in rows]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(num_cpus=2):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        yield


def png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def check(answers: pa.Table, questions: Path, expected: list[RequestOutput]) -> None:
    rows, asked = answers.to_pylist(), pa.parquet.read_table(questions)
    assert answers.column_names == ["id", "question", "n", *ANSWER_SCHEMA.names]
    assert [row["id"] for row in rows] == asked["id"].to_pylist() and [row["n"] for row in rows] == list(range(ROWS))
    for row, output in zip(rows, expected, strict=True):
        completion, pyramid = output.outputs[0], output.pyramid
        assert (row["answer"], row["route"], row["error"]) == (completion.text, pyramid.experts, None)
        assert row["visual_tokens"] == pyramid.visual_tokens and row["prefill_flops"] == pyramid.flops.prefill
        assert row["cumulative_logprob"] == pytest.approx(completion.cumulative_logprob, abs=1e-3)
        assert row["logprobs"] == pytest.approx(
            [each[token].logprob for token, each in zip(completion.token_ids, completion.logprobs, strict=True)],
            abs=1e-3,
        )


def test_a_job_that_was_killed_goes_on(
    engine_dir: Path, questions: Path, expected: list[RequestOutput], tmp_path: Path, cluster: None
) -> None:
    """The first job is a process with a cluster of its own, as a user's is; all of it is killed."""
    output = tmp_path / "job"
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(f"""
        import time
        from tests.ray_cluster import ray_cluster
        from dpn_rt import SamplingParams
        from dpn_rt.batch import Processor, answer_parquet, build_processor

        class Slow(Processor):
            def __call__(self, dataset):
                return super().__call__(dataset).map_batches(self.wait, batch_format="pyarrow")

            def wait(self, table):
                time.sleep(1)
                return table

        with ray_cluster(num_cpus=2):
            params = SamplingParams(temperature=0, max_tokens=6, logprobs=0)
            processor = build_processor({str(engine_dir)!r}, params, batch_size=6, max_num_seqs=8)
            answer_parquet({str(questions)!r}, {str(output)!r}, Slow(**vars(processor)), rows_per_file=6)
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    job = subprocess.Popen([sys.executable, str(script)], env=environment)
    deadline = time.monotonic() + 100
    while not finished(output):
        assert time.monotonic() < deadline and job.poll() is None, "no answers"
        time.sleep(0.02)
    family = psutil.Process(job.pid).children(recursive=True)
    for process in (psutil.Process(job.pid), *family):
        process.send_signal(signal.SIGKILL)
    job.wait()
    psutil.wait_procs(family, timeout=2)  # not longer: a container may leave what has ended as it is
    first = finished(output)
    assert 0 < sum(len(ids) for _, ids in first.values()) < ROWS, "it was killed half-way"
    (output / "answers" / ".half.tmp").write_bytes(b"PAR1")
    with pytest.raises(DpnError, match="have no answer yet"):
        read_answers(questions, output)

    processor = build_processor(engine_dir, PARAMS, batch_size=6, max_num_seqs=8)
    answer_parquet(questions, output, processor, rows_per_file=6)
    second = finished(output)
    assert all(second[name] == stamp for name, stamp in first.items()), "finished files are kept as they are"
    assert sum(len(ids) for _, ids in second.values()) == ROWS, "no row was answered twice"
    assert not list((output / "answers").glob(".*")), "what was half written is removed"
    check(read_answers(questions, output), questions, expected)
    answer_parquet(questions, output, processor, rows_per_file=6)  # nothing is left
    assert finished(output) == second
    other = build_processor(engine_dir, SamplingParams(temperature=0, max_tokens=7))
    with pytest.raises(DpnError, match="max_tokens"):
        answer_parquet(questions, output, other, rows_per_file=6)
    with (output / "settings.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DpnError, match="another job"):
            answer_parquet(questions, output, processor)


def finished(output: Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """When each file of answers was written, and its ids."""
    return {
        path.name: (path.stat().st_mtime_ns, tuple(pa.parquet.read_table(path)["id"].to_pylist()))
        for path in (output / "answers").glob("*.parquet")
    }


def test_an_actor_that_is_killed_comes_back(
    engine_dir: Path, questions: Path, expected: list[RequestOutput], tmp_path: Path, cluster: None
) -> None:
    note = tmp_path / "killed"

    def kill_once(batch: pa.Table) -> pa.Table:
        """Half-way: ends the actor that holds the engine, which may be this process."""
        if not note.exists() and 30 in batch["n"].to_pylist():
            siblings = psutil.Process().parent().children()  # those of this cluster's raylet alone
            engines = [
                each for each in siblings if {"MapWorker", "Answerer"} <= set(re.findall(r"\w+", each.cmdline()[0]))
            ]
            note.write_text(str(len(engines)))
            for process in engines:
                process.kill()
        return batch

    processor = build_processor(engine_dir, PARAMS, batch_size=6, max_num_seqs=8)
    dataset = ray.data.read_parquet(str(questions)).repartition(target_num_rows_per_block=6)
    answers = processor(dataset.map_batches(kill_once, batch_format="pyarrow", batch_size=6)).to_pandas()
    assert note.read_text() == "1"
    table = pa.Table.from_pylist(answers.sort_values("n").to_dict("records"), schema=_schema(questions))
    check(table, questions, expected)


def test_the_example_answers_a_table(cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer_parquet_example([str(tmp_path), "--questions", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"background +[12] of 2", lines[0]) and lines[-1].endswith("; 0 questions without an answer")


def _schema(questions: Path) -> pa.Schema:
    asked = pa.parquet.read_schema(questions)
    return pa.schema([asked.field(name) for name in ("id", "question", "n")] + list(ANSWER_SCHEMA))


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
        ({"cpus_per_actor": -1}, "cpus_per_actor=-1"),
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
