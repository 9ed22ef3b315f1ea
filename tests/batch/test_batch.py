"""Batches on Ray Data: the answers of one engine, each question once, whatever is killed."""

from __future__ import annotations

import fcntl
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
import ray

from dpn_rt import LLM, DpnError, SamplingParams
from dpn_rt.batch import Processor, answer_parquet, build_processor, read_answers
from dpn_rt.batch.answer_schema import ANSWER_SCHEMA
from dpn_rt.batch.answering import Answerer
from dpn_rt.batch.options import AnswerOptions
from dpn_rt.errors import ConfigError
from dpn_rt.evaluate.__main__ import main as evaluate
from dpn_rt.evaluate.commands.run import SKIPPED
from dpn_rt.evaluate.runs import skipped_file
from dpn_rt.outputs import RequestOutput
from examples.answer_parquet import main as answer_parquet_example
from examples.tiny_dpn import data
from examples.tiny_dpn.export_questions import export
from tests.batch.conftest import PARAMS, png
from tests.evaluate.conftest import read_lines, without_times
from tests.ray_cluster import ray_cluster

ROWS = 60


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
def cluster() -> Iterator[str]:
    """One for all tests here; its address."""
    with ray_cluster(num_cpus=2):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        yield ray.get_runtime_context().gcs_address


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
    engine_dir: Path, questions: Path, expected: list[RequestOutput], tmp_path: Path, cluster: str
) -> None:
    """The first job is a process that joins the cluster. It answers half of the rows and stops; then it and its workers
    are killed."""
    output = tmp_path / "job"
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(f"""
        import threading
        import pyarrow.compute as pc
        import ray
        from dpn_rt import SamplingParams
        from dpn_rt.batch import Processor, answer_parquet, build_processor

        class Slow(Processor):
            def __call__(self, dataset):
                return super().__call__(dataset).map_batches(self.wait, batch_format="pyarrow")

            def wait(self, table):
                if pc.max(table["n"]).as_py() >= {ROWS // 2}:
                    threading.Event().wait()
                return table

        ray.init({cluster!r}, log_to_driver=False)
        params = SamplingParams(temperature=0, max_tokens=6, logprobs=0)
        processor = build_processor({str(engine_dir)!r}, params, batch_size=6, max_num_seqs=8)
        answer_parquet({str(questions)!r}, {str(output)!r}, Slow(**vars(processor)), rows_per_file=6)
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    kill_with_workers([sys.executable, str(script)], environment, lambda: bool(finished(output)))
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


def kill_with_workers(command: list[str], environment: dict[str, str], is_time: Callable[[], bool]) -> None:
    """Starts a process that joins the cluster, waits for something, and kills it and its workers on the cluster."""
    raylet = next(each for each in psutil.Process().children() if "raylet" in each.name())
    job = subprocess.Popen(command, env=environment)
    try:
        while not is_time():
            assert job.poll() is None, "it has ended by itself"
            time.sleep(0.02)
    finally:
        job.kill()
        job.wait()
    # Its agents are not to be killed.
    workers = [each for each in raylet.children() if re.search(r"^ray::(?!\w*Agent)|default_worker\.py", title(each))]
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.kill()
    while any(is_alive(worker) for worker in workers):
        time.sleep(0.02)


def title(process: psutil.Process) -> str:
    """Empty when it has ended."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; what has ended may be left as it is for a while."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def finished(output: Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """When each file of answers was written, and its ids."""
    return {
        path.name: (path.stat().st_mtime_ns, tuple(pa.parquet.read_table(path)["id"].to_pylist()))
        for path in (output / "answers").glob("*.parquet")
    }


def test_an_actor_that_is_killed_comes_back(
    engine_dir: Path, questions: Path, expected: list[RequestOutput], tmp_path: Path, cluster: str
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


def test_a_folder_takes_a_second_file_of_questions(engine_dir: Path, tmp_path: Path, cluster: str) -> None:
    """As many as have answers, of other ids. No engine answers them, since each would take seconds to start."""

    class Echo(Processor):
        def __call__(self, dataset: ray.data.Dataset) -> ray.data.Dataset:
            return dataset.map_batches(echo, batch_format="pyarrow")

    def echo(table: pa.Table) -> pa.Table:
        answers = {field.name: pa.nulls(len(table), field.type) for field in ANSWER_SCHEMA}
        answers["answer"] = table["question"]
        return pa.table({**dict(zip(table.column_names, table.columns, strict=True)), **answers}).drop(["image"])

    processor, job = Echo(**vars(build_processor(engine_dir, PARAMS))), tmp_path / "job"
    for first in (1, 4):
        path = tmp_path / f"{first}.parquet"
        ids = list(range(first, first + 3))
        questions = [f"What is {each}?" for each in ids]
        pa.parquet.write_table(pa.table({"id": ids, "image": pa.nulls(3, pa.binary()), "question": questions}), path)
        answer_parquet(path, job, processor)
        answers = read_answers(path, job)
        assert answers["id"].to_pylist() == ids and answers["answer"].to_pylist() == questions


def test_questions_that_failed_are_asked_again_where_the_caller_wants_it(
    engine_dir: Path, tmp_path: Path, cluster: str
) -> None:
    """Here the odd ones fail until a file is there."""

    class Failing(Processor):
        def __call__(self, dataset: ray.data.Dataset) -> ray.data.Dataset:
            return dataset.map_batches(fail, batch_format="pyarrow")

    repaired = tmp_path / "repaired"

    def fail(table: pa.Table) -> pa.Table:
        asked = table["id"].to_pylist()
        errors = ["broken" if value % 2 and not repaired.exists() else None for value in asked]
        answers = {field.name: pa.nulls(len(table), field.type) for field in ANSWER_SCHEMA}
        answers["answer"] = pa.array([None if error else str(sorted(asked)) for error in errors], pa.string())
        answers["error"] = pa.array(errors, pa.string())
        return pa.table({**dict(zip(table.column_names, table.columns, strict=True)), **answers}).drop(["image"])

    processor, job = Failing(**vars(build_processor(engine_dir, PARAMS))), tmp_path / "job"
    path, ids = tmp_path / "questions.parquet", [1, 2, 3, 4]
    table = {"id": ids, "image": pa.nulls(4, pa.binary()), "question": ["?"] * 4}
    pa.parquet.write_table(pa.table(table), path)

    def ask(*, retry_failed: bool) -> list[tuple[str | None, str | None]]:
        answer_parquet(path, job, processor, retry_failed=retry_failed)
        answers = read_answers(path, job)
        assert answers["id"].to_pylist() == ids
        return list(zip(answers["answer"].to_pylist(), answers["error"].to_pylist(), strict=True))

    first = ask(retry_failed=False)
    assert first == [(None, "broken"), (str(ids), None)] * 2
    assert ask(retry_failed=True) == first  # they fail again
    repaired.touch()
    assert ask(retry_failed=False) == first
    assert ask(retry_failed=True) == [(str([1, 3]), None), (str(ids), None)] * 2  # those alone are asked again
    assert ask(retry_failed=True) == ask(retry_failed=False)


@pytest.mark.parametrize("size", [{"cpus_per_actor": 2.5}, {"actors": 3}, {"gpus_per_actor": 1}])
def test_actors_that_the_cluster_has_no_room_for(
    engine_dir: Path, questions: Path, tmp_path: Path, cluster: str, size: dict[str, Any]
) -> None:
    """Ray would wait for it without an end."""
    with pytest.raises(ConfigError, match=r"^actors=. with .pus_per_actor=.* need .*: expected at most [02], which"):
        answer_parquet(questions, tmp_path / "job", build_processor(engine_dir, **size))


def test_the_example_answers_a_table(cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer_parquet_example([str(tmp_path), "--questions", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"background +[12] of 2", lines[0]) and lines[-1].endswith("; 0 questions without an answer")


@dataclass(frozen=True)
class Asked:
    """Questions in files, some of them bad, and how the plain command answers them in two runs."""

    arguments: list[str]
    answers: list[list[dict[str, Any]]]
    skipped: list[list[dict[str, Any]]]


@pytest.fixture(scope="module")
def asked(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    folder = tmp_path_factory.mktemp("evaluate")
    path = export(folder, 2)
    lines = path.read_text().splitlines(keepends=True)
    lines[7:7] = ['{"question_id": 70, "ima\n', '{"question_id": 71, "image": "missing.png", "text": "?"}\n']
    path.write_text("".join(lines))
    options = ["--engine", engine_dir, "--question-file", path, "--image-folder", folder / "images"]
    options += [
        "--max-num-seqs",
        2,
        "--max_new_tokens",
        6,
        "--sweep",
        "router_bias=0,32",
        "--temperature",
        2,
        "--quiet",
    ]
    arguments = ["run", "--quiet", *map(str, options)]
    assert evaluate([*arguments, "--answers-file", str(folder / "a.jsonl")]) == SKIPPED
    return Asked(arguments, *results(folder / "a.jsonl"))


def results(path: Path) -> tuple[list[list[dict[str, Any]]], list[list[dict[str, Any]]]]:
    """Answers of the two runs, without times, and skipped rows."""
    paths = answers_files(path)
    return [without_times(each) for each in paths], [read_lines(skipped_file(each)) for each in paths]


def answers_files(path: Path) -> list[Path]:
    return [path.with_name(f"{path.stem}.router_bias={bias}.jsonl") for bias in (0, 32)]


def test_the_evaluation_on_ray_was_killed_and_goes_on_to_the_same_answers(
    asked: Asked, cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs of sampled answers in one pipeline, with rows that are bad."""
    path = tmp_path / "a.jsonl"
    arguments = [*asked.arguments, "--answers-file", str(path), "--ray"]
    first = answers_files(path)[0]
    command = [sys.executable, "-m", "dpn_rt.evaluate", *arguments, "--ray-address", cluster]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    kill_with_workers(command, environment, lambda: first.exists() and first.read_bytes().count(b"\n") > 0)
    kept = first.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    done = sum(each.read_bytes().count(b"\n") for each in answers_files(path) if each.exists())

    capsys.readouterr()
    assert evaluate(arguments) == SKIPPED
    told = capsys.readouterr().out
    assert sum(int(new) for new in re.findall(r"(\d+) of them new", told)) == 2 * 20 - done, told
    assert set(kept.splitlines()) <= set(first.read_bytes().splitlines()), "answers are kept as they were"
    answers, skipped = results(path)
    assert answers == asked.answers and skipped == asked.skipped
    assert [len(each) for each in answers] == [20, 20] and answers[0] != answers[1]


def test_what_engines_on_ray_say_is_told(
    engine_dir: Path, asked: Asked, cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The actors compare the files with the engine's record."""
    damaged = tmp_path / "damaged"
    shutil.copytree(engine_dir, damaged)
    with (damaged / "weights.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    arguments = [*asked.arguments, "--engine", str(damaged), "--answers-file", str(tmp_path / "a.jsonl"), "--ray"]
    assert evaluate(arguments) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: the engines on Ray cannot answer: ") and "sha256" in told, told


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ray", "--replicas", "3"], "3 replicas with --cpus-per-replica 1 need 3 cores: expected at most 2"),
        (["--ray", "--replicas", "2"], "2 engines with 1 cores each take all 2 cores"),
        (["--ray", "--gpus-per-replica", "1"], "1 replicas with --gpus-per-replica 1 need 1 GPUs"),
        (["--ray", "--replicas", "0"], "--replicas 0"),
        (["--ray", "--cpus-per-replica", "-1"], "--cpus-per-replica -1: expected a number, 0 or more"),
        (["--ray", "--gpus-per-replica", "nan"], "--gpus-per-replica nan: expected a number, 0 or more"),
        (["--ray", "--tensor-parallel-size", "2"], "--tensor-parallel-size 2"),
        (["--ray", "--device", "cuda"], "--gpus-per-replica"),
        (["--ray", "--device", "cpu", "--gpus-per-replica", "1"], "--device cpu"),
        (["--replicas", "2"], "--replicas: expected --ray"),
        (["--ray-address", "x"], "--ray-address: expected --ray"),
        (["--ray", "--route", "9,9,9"], "route"),
    ],
)
def test_options_of_ray_that_do_not_fit_are_told(
    asked: Asked,
    cluster: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    path = tmp_path / "a.jsonl"
    assert evaluate([*asked.arguments, "--answers-file", str(path), *options]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ") and words in told, told


def _schema(questions: Path) -> pa.Schema:
    asked = pa.parquet.read_schema(questions)
    return pa.schema([asked.field(name) for name in ("id", "question", "n")] + list(ANSWER_SCHEMA))
