"""`evaluate run` on the small trained model: LLaVA's answers, in order, once each, whatever happens on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks import evaluate as evaluate_benchmark
from dpn_rt import LLM
from dpn_rt.evaluate.__main__ import main
from dpn_rt.evaluate.trace import pyramid_of
from examples.tiny_dpn.answers import ask_runtime
from examples.tiny_dpn.data import sample
from tests.evaluate.conftest import ROOT, SCENES, Tiny, read_lines, without_times, write_lines


@pytest.fixture(scope="module")
def answers(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("answers") / "new" / "answers.jsonl"
    assert main([*tiny.arguments(path), "--conv-mode", "vicuna_v1", "--temperature", "0"]) == 0
    return path


def test_answers_are_those_of_the_example(
    tiny: Tiny, llm: LLM, answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The accuracy of examples/tiny_dpn/evaluate.py, question by question."""
    expected = ask_runtime(llm, [sample("test", index) for index in range(SCENES)], "expected")
    lines = read_lines(answers)
    assert [line["text"] for line in lines] == [answer.text.strip() for answer in expected]
    assert [line["metadata"]["flops"] for line in lines] == [answer.flops for answer in expected]
    assert [tuple(line["metadata"]["route"]) for line in lines] == [answer.route for answer in expected]
    assert (
        main(["score", "exact", "--answers-file", str(answers), "--question-file", str(tiny.questions), "--json"]) == 0
    )
    scored = json.loads(capsys.readouterr().out)["scores"][0]
    accuracy = 100 * sum(answer.is_right for answer in expected) / len(expected)
    assert scored["metrics"]["accuracy"] == pytest.approx(accuracy) and scored["missing"] == 0


def test_a_line_is_llavas_with_a_trace(tiny: Tiny, answers: Path) -> None:
    line, row = read_lines(answers)[0], tiny.rows[0]
    assert list(line) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (line["question_id"], line["prompt"], line["model_id"]) == (row["question_id"], row["text"], "engine")
    trace = line["metadata"]
    assert trace["category"] == row["category"] and trace["settings"]["conv_mode"] == "vicuna_v1"
    assert len(trace["visual_tokens"]) == len(trace["kv_lengths"]) == 4 and trace["visual_tokens"][0] == 256
    assert 0 < trace["flops"] < trace["dense_flops"]
    assert 0 < trace["seconds"]["first_token"] <= trace["seconds"]["total"]


def test_a_trace_is_a_pyramid_again(llm: LLM, answers: Path) -> None:
    expected = llm.chat([{"role": "user", "content": [
        {"type": "image", "image": sample("test", 0).image}, {"type": "text", "text": read_lines(answers)[0]["prompt"]}
    ]}])[0].pyramid  # fmt: skip
    made = pyramid_of(read_lines(answers)[0]["metadata"])
    for name in (
        "kernels",
        "visual_tokens",
        "kv_lengths",
        "grids",
        "image_grid",
        "image_segments",
        "patches_per_token",
        "reduction",
    ):
        assert getattr(made, name) == getattr(expected, name), name
    assert made.flops == expected.flops


@pytest.fixture
def children(tiny: Tiny, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """See child.py."""
    one = write_lines(tmp_path / "one.jsonl", tiny.rows[:1])
    first = json.dumps(tiny.arguments(tmp_path / "first.jsonl", question_file=one))
    command = [sys.executable, "-m", "tests.evaluate.child", first]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:  # type: ignore[call-overload]
        yield process
        process.stdin.close()


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_five_kills_leave_no_trace(tiny: Tiny, answers: Path, children: subprocess.Popen[str], tmp_path: Path) -> None:
    """SIGKILL at random moments; each next run goes on. The first comes before any answer."""
    assert children.stdin is not None and children.stdout is not None
    path = tmp_path / "killed.jsonl"
    arguments = [*tiny.arguments(path, max_num_seqs=4), "--conv-mode", "vicuna_v1", "--temperature", "0"]
    wanted = [0, *sorted(random.sample(range(1, 10 * SCENES - 8), 4))]
    seen = []
    for number in wanted:
        print(json.dumps(arguments), file=children.stdin, flush=True)
        process = int(children.stdout.readline())
        while count_lines(path) < number:
            time.sleep(0.001)
        with suppress(ProcessLookupError):  # on a busy machine it may have finished
            os.kill(process, signal.SIGKILL)
        children.stdout.readline()
        seen.append(count_lines(path))
        if number == wanted[2]:  # half a line, as where the system stops
            with path.open("ab") as file:
                file.write(b'{"question_id": 3, "prom')
    assert seen == sorted(seen), "no answer is lost"
    assert main(arguments) == 0
    assert without_times(path) == without_times(answers)


def test_a_finished_run_loads_nothing(
    tiny: Tiny, answers: Path, no_load: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = answers.read_bytes()
    assert main([*tiny.arguments(answers), "--conv-mode", "vicuna_v1"]) == 0
    assert answers.read_bytes() == before
    assert "30 answers, 0 of them new" in capsys.readouterr().out


def test_answers_come_into_the_order_of_the_questions(tiny: Tiny, answers: Path, no_load: None, tmp_path: Path) -> None:
    lines = answers.read_bytes().splitlines(keepends=True)
    random.shuffle(lines)
    path, target = tmp_path / "link.jsonl", tmp_path / "target.jsonl"
    target.write_bytes(b"".join(lines))
    path.symlink_to(target)
    assert main([*tiny.arguments(path), "--conv-mode", "vicuna_v1"]) == 0
    assert path.is_symlink() and target.read_bytes() == answers.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link.jsonl", "target.jsonl"]


def test_chunks_are_the_whole(tiny: Tiny, answers: Path, tmp_path: Path) -> None:
    """LLaVA's way to several processes: parts that are joined by `cat`."""
    parts = []
    for index in range(3):
        parts.append(tmp_path / f"{index}.jsonl")
        arguments = tiny.arguments(parts[-1], num_chunks=3, chunk_idx=index)
        assert main([*arguments, "--conv-mode", "vicuna_v1"]) == 0
    joined = tmp_path / "joined.jsonl"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert without_times(joined) == without_times(answers)


def test_a_sweep_writes_a_file_a_value(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = write_lines(tmp_path / "few.jsonl", tiny.rows[:5])
    arguments = tiny.arguments(tmp_path / "a.jsonl", question_file=few)
    assert (
        main(
            [*arguments, "--sweep", "router_bias=-8,0,32", "--sweep", "route=2,2,2;none,none,none", "--score", "exact"]
        )
        == 0
    )
    names = ["a.route=2,2,2.jsonl", "a.route=none,none,none.jsonl"]
    names += ["a.router_bias=-8.jsonl", "a.router_bias=0.jsonl", "a.router_bias=32.jsonl"]
    assert sorted(path.name for path in tmp_path.glob("a*")) == names
    flops = {name: sum(line["metadata"]["flops"] for line in read_lines(tmp_path / name)) for name in names}
    assert flops[names[4]] < flops[names[3]] < flops[names[2]] and flops[names[1]] == flops[names[3]]
    assert all(line["metadata"]["visual_tokens"] == [256, 64, 16, 4] for line in read_lines(tmp_path / names[0]))
    assert capsys.readouterr().out.count("accuracy ") >= 5


def test_sampled_answers_do_not_depend_on_the_batch(tiny: Tiny, tmp_path: Path) -> None:
    few = write_lines(tmp_path / "few.jsonl", tiny.rows[:6])
    texts = []
    for name, count in (("a", 6), ("b", 1)):
        path = tmp_path / f"{name}.jsonl"
        arguments = tiny.arguments(path, question_file=few, max_num_seqs=count, temperature=3, seed=5)
        assert main(arguments) == 0
        texts.append(without_times(path))
    assert texts[0] == texts[1]


def test_the_benchmark_compares_equal_answers(tiny: Tiny, tmp_path: Path) -> None:
    """No time is asserted."""
    result = evaluate_benchmark.measure(tiny.engine, tmp_path, scenes=1, repeats=1)
    assert result["same_answers"] == 1 and result["questions"] == 10
    assert evaluate_benchmark.ratio({"chat": [2.0, 3.0, 9.0], "evaluate": [1.0, 2.0, 9.0]}) == 1.5
