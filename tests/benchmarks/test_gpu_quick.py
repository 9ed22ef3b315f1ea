"""`make gpu-quick`: every step has a process and a time of its own, and all of them run on the CPU with tiny sizes."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison.measure import WrongWorkError
from benchmarks.gpu_quick import __main__ as command
from benchmarks.gpu_quick import baselines, sanitize
from benchmarks.gpu_quick.build import architectures
from benchmarks.gpu_quick.pytest_files import PYTEST, Job, Result, files_under, run_jobs
from benchmarks.gpu_quick.record import NotHereError, Recorder
from benchmarks.gpu_quick.runner import DONE, FAILED, NOT_HERE, NOT_RUN, STOPPED, Run
from benchmarks.gpu_quick.sanitize import TESTS, listed_for
from benchmarks.gpu_quick.settings import GPU, STAND_IN, Settings
from benchmarks.gpu_quick.steps import STEPS, TOTAL_SECONDS, Step
from benchmarks.measuring import limits

ROOT = Path(__file__).parents[2]

FAKE_STEP = """
import json, os, subprocess, sys, time
name, settings, file, folder, seconds = sys.argv[1:]
found = {"values": {"name": name}, "lines": ["a line"]}
if name == "missing":
    found["values"]["not_here"] = "it lacks a thing"
open(file, "w").write(json.dumps(found))
print("says", name, flush=True)
if name == "slow":
    time.sleep(2)
if name == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    open(folder + "/child", "w").write(str(child.pid))
    time.sleep(100)
if name == "hangs_in_a_group":
    from benchmarks.gpu_quick.pytest_files import Job, run_jobs
    test = "import os, time\\ndef test_hangs():\\n    open({!r}, 'w').write(str(os.getpid()))\\n    time.sleep(100)\\n"
    open(folder + "/test_hangs.py", "w").write(test.format(folder + "/group"))
    list(run_jobs([Job("hangs", (folder + "/test_hangs.py",))], 1, 100))
if name == "dies":
    os.abort()
sys.exit(name == "build")
"""


def run_fake(folder: Path, *steps: Step, seconds: float = 60) -> tuple[Run, list[str]]:
    script, lines = folder / "step.py", list[str]()
    script.write_text(FAKE_STEP)
    run = Run(STAND_IN, folder / "out", seconds, lines.append, (sys.executable, str(script)))
    run.steps(steps)
    return run, lines


def test_all_steps_fit_into_nine_minutes() -> None:
    assert sum(step.seconds for step in STEPS) <= TOTAL_SECONDS == 540
    assert len({step.name for step in STEPS}) == len(STEPS)
    for step in STEPS:
        assert (ROOT / "benchmarks" / "gpu_quick" / f"{step.name}.py").exists()
    assert Settings.from_json(GPU.to_json()) == GPU


def test_a_step_that_hangs_or_dies_costs_the_others_nothing(tmp_path: Path) -> None:
    steps = (Step("hangs", 2, False), Step("dies", 9, False), Step("missing", 9, False), Step("good", 9, False))
    run, lines = run_fake(tmp_path, *steps)
    assert [each.state for each in run.outcomes] == [STOPPED, FAILED, NOT_HERE, DONE]
    assert [each.why for each in run.outcomes][:3] == ["it took longer than 2 s", "exit status -6", "it lacks a thing"]
    assert all(each.values["name"] == each.step for each in run.outcomes), "what was found before the end is kept"
    child = int((tmp_path / "out" / "child").read_text())
    assert not is_running(child), "children end with their step"
    saved = json.loads((tmp_path / "out" / "gpu-quick.json").read_text())
    assert [each["state"] for each in saved["steps"]] == [each.state for each in run.outcomes]
    log = (tmp_path / "out" / "gpu-quick.log").read_text()
    assert all(f"says {step.name}" in log for step in steps)
    assert any("says dies" in line for line in lines) and "   a line" in lines


def test_groups_of_processes_end_with_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    run, _ = run_fake(tmp_path, Step("hangs_in_a_group", 8, False))
    assert [each.state for each in run.outcomes] == [STOPPED]
    assert not is_running(int((tmp_path / "out" / "group").read_text()))


def test_a_step_may_take_what_others_have_left_and_no_more(tmp_path: Path) -> None:
    """A step that hangs leaves the next one its own time; one that ends early leaves it the rest of its own too."""
    run, _ = run_fake(tmp_path, Step("hangs", 1, False), Step("missing", 20, False), Step("slow", 1, False))
    hangs, early, slow = run.outcomes
    assert [each.state for each in run.outcomes] == [STOPPED, NOT_HERE, DONE]
    assert (hangs.limit, early.limit) == (1, 20)
    assert slow.limit == pytest.approx(21 - early.seconds) and slow.seconds > 1


def is_running(process: int) -> bool:
    for _ in range(50):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


def test_without_kernels_only_steps_run_that_need_none(tmp_path: Path) -> None:
    run, _ = run_fake(tmp_path, Step("build", 9, False), Step("needs", 9), Step("needs_none", 9, False))
    assert [each.state for each in run.outcomes] == [FAILED, NOT_RUN, DONE]


def test_no_step_begins_without_time(tmp_path: Path) -> None:
    run, _ = run_fake(tmp_path, Step("good", 9, False), seconds=1)
    assert [(each.state, each.why) for each in run.outcomes] == [(NOT_RUN, "no time is left")]


APART = ("environment", "build", "gemm", "sanitize")
"""Steps that the test of the command runs. The others run in the process of the tests, which has imported all."""


def test_the_command_runs_on_the_stand_in(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "benchmarks.gpu_quick", "--stand-in", "--out", str(out), "--steps", *APART]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + (out / "gpu-quick.log").read_text()
    steps = {step["step"]: step for step in json.loads((out / "gpu-quick.json").read_text())["steps"]}
    assert [steps[name]["state"] for name in APART[:3]] == [DONE] * 3
    assert steps["sanitize"]["state"] in (DONE, NOT_HERE)
    assert steps["environment"]["values"]["copy_bytes_per_second"] > 0
    assert len(steps["gemm"]["values"]["products"]) == 4 * len(STAND_IN.gemm_rows)
    assert sorted(path.name for path in out.iterdir()) == ["gpu-quick.json", "gpu-quick.log"]
    assert "build done" in done.stdout.splitlines()[-1]


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("name", [step.name for step in STEPS if step.name not in APART])
def test_every_other_step_runs_on_the_stand_in(tmp_path: Path, name: str) -> None:
    file = tmp_path / "step.json"
    record = Recorder(file, tmp_path)
    importlib.import_module(f"benchmarks.gpu_quick.{name}").run(STAND_IN, record)
    assert record.failed_parts == []
    CHECKS[name](json.loads(file.read_text())["values"])


def check_op_tests(values: dict[str, Any]) -> None:
    assert values["total"]["passed"] > 0 and values["total"]["failed"] == 0 and values["bad"] == []


def check_model(values: dict[str, Any]) -> None:
    for reference in ("transformers", "eager"):
        found = values[f"first_logits_{reference}"]
        assert found["relative"] < 1e-3 and found["same_best"] and found["finite"]
    assert set(values["times"]) == {"222 x1", "1x1 x1", "mixed x2"}
    assert all(len(each["stages"]) == 4 and min(each["stages"]) > 0 for each in values["times"].values())
    assert values["prefill_kernels"] and values["decode_kernels"]
    assert values["load"]["seconds"] > 0 and values["load"]["stage_graphs"] == 0


def check_attention(values: dict[str, Any]) -> None:
    for each in (*values["prefills"], *values["decodes"]):
        assert isinstance(each["seconds"]["dpn_rt"], float) and isinstance(each["seconds"]["sdpa"], float)


def check_baselines(values: dict[str, Any]) -> None:
    assert {row["subject"] for row in values["report"]["rows"]} == {"transformers", "eager", "dpn_rt"}
    assert values["report"]["rounds"] == STAND_IN.rounds
    assert all(len(samples["prefill"]) == STAND_IN.rounds for samples in values["samples"].values())


def check_answers(values: dict[str, Any]) -> None:
    assert values["questions"] == 10 and values["others"] == []
    assert values["right"]["cpu"] == values["right"]["device"] >= 6


CHECKS = {
    "op_tests": check_op_tests, "model": check_model, "attention": check_attention, "baselines": check_baselines,
    "answers": check_answers,
}  # fmt: skip


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("READ_BYTES", "MIN_GEMM_WEIGHT_BYTES"):
        monkeypatch.setattr(limits, size, 1 << 20)


@pytest.mark.usefixtures("small_limits")
def test_a_baseline_that_cannot_be_made_or_run_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_row = baselines.run_row

    def no_dense(*_: object) -> None:
        raise AttributeError("no such attribute")

    def wrong_work(subject: Any, row: Any, *given: Any) -> None:
        if row.subject == "eager":
            raise WrongWorkError("wrong work measured")
        run_row(subject, row, *given)

    monkeypatch.setattr(baselines, "load_dense", no_dense)
    monkeypatch.setattr(baselines, "run_row", wrong_work)
    record = Recorder(tmp_path / "step.json", tmp_path)
    baselines.run(STAND_IN, record)
    assert {row["subject"] for row in record.values["report"]["rows"]} == {"dpn_rt"}
    assert record.failed_parts == ["transformers", "eager 222 x1"]
    assert record.values["transformers_error"] == "AttributeError: no such attribute"


@pytest.mark.usefixtures("small_limits")
def test_baselines_tell_what_they_have_when_their_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, measured = Recorder(tmp_path / "step.json", tmp_path), list[str]()

    def run_row(subject: Any, row: Any, model: Any, steps: int) -> None:
        measured.append(row.subject)
        row.add(prefill=1.0, decode_step=0.5)
        if len(measured) == 6:  # the second of the round that counts
            monkeypatch.setattr(baselines, "SECONDS_TO_TELL", 10**6)

    monkeypatch.setattr(baselines, "run_row", run_row)
    baselines.run(STAND_IN, record)
    assert len(measured) == 6 and len(record.values["samples"]) == 2 and "report" not in record.values
    assert record.failed_parts == [] and record.lines[0].endswith("prefill 1000.00, decode 500.00 ms")


def test_steps_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    for wrong in (["--steps", "none"], ["--seconds", "0"]):
        with pytest.raises(SystemExit):
            command.main(["--out", str(tmp_path), *wrong])


def test_each_test_file_has_a_process_of_its_own(tmp_path: Path) -> None:
    bodies = {"good": "assert True", "wrong": "assert 1 == 2, 'the reason'", "dies": "import os; os.abort()"}
    jobs = []
    for name, body in bodies.items():
        (tmp_path / f"test_{name}.py").write_text(f"def test_it():\n    {body}\n")
        jobs.append(Job(name, (str(tmp_path / f"test_{name}.py"),)))
    results: dict[str, Result] = {result.name: result for result in run_jobs(jobs, 2, 300, tmp_path / "junit.xml")}
    assert [name for name, result in results.items() if result.is_good] == ["good"]
    assert results["good"].counts == {"passed": 1, "failed": 0, "skipped": 0}
    assert results["wrong"].status == 1 and "the reason" in results["wrong"].failures[0]
    assert results["dies"].status == -6
    assert (tmp_path / "junit.xml").read_text().count("<testsuite ") == 2


def test_test_files_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    body = "import os\ndef test_it():\n    assert os.environ['OMP_NUM_THREADS'] == '{}'\n"
    body += "    assert os.environ['OMP_WAIT_POLICY'] == 'passive'\n"
    for given, expected in ((None, 8), ("3", 3)):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        (tmp_path / "test_cores.py").write_text(body.format(expected))
        job = Job("cores", (str(tmp_path / "test_cores.py"),))
        assert [result.status for result in run_jobs([job, job], 8, 300)] == [0, 0]


def test_a_test_file_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    """With what its processes have started, and its lines tell which tests ran before and which one hung."""
    (tmp_path / "test_hangs.py").write_text(f"""
import subprocess, sys, time
import pytest

def test_good():
    pass

def test_wrong():
    assert False

@pytest.mark.skip
def test_skipped():
    pass

@pytest.mark.parametrize("name", ["a name"])
def test_hangs(name):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
    time.sleep(100)
""")
    (result,) = run_jobs([Job("hangs", (str(tmp_path / "test_hangs.py"),))], 1, 8)
    assert result.status is None and not result.is_good and result.seconds < 50
    assert result.counts == {"passed": 1, "failed": 1, "skipped": 1}
    assert [failure.partition("::")[2] for failure in result.failures] == [
        "test_wrong", "test_hangs[a name]: ran when the process ended",
    ]  # fmt: skip
    assert not is_running(int((tmp_path / "child").read_text()))


def test_folders_become_their_test_files() -> None:
    found = files_under(["tests/device", "tests/ops/test_norm.py"])
    assert {"tests/device/test_faults.py", "tests/ops/test_norm.py"} <= set(found)
    assert all(Path(file).name.startswith("test_") for file in found)
    assert files_under(GPU.test_files)[0].startswith("tests/backends/kernels/")


def test_the_listed_files_are_those_with_tests_that_run_on_a_gpu() -> None:
    folders = ("tests/ops", "tests/backends/kernels", "tests/device")
    command = [sys.executable, "-m", "pytest", *PYTEST, "-qqq", "--collect-only", "-m", GPU.marks, *folders]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    collected = {line.rpartition(": ")[0] for line in done.stdout.splitlines() if line.startswith("tests/")}
    without_gpu = "\npytestmark = pytest.mark.skipif(HAS_GPU, "
    assert {file for file in collected if without_gpu not in (ROOT / file).read_text()} == set(GPU.test_files)


def test_the_tests_under_the_sanitizer_exist() -> None:
    """Their functions; parameters are told by pytest where one is wrong."""
    for name in TESTS:
        file, _, test = name.partition("::")
        functions = {
            node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert test.partition("[")[0] in functions, name
        assert "[cuda" in test or "-cuda" in test, name


def test_racecheck_runs_what_shares_memory() -> None:
    assert listed_for("memcheck") == TESTS
    left_out = set(TESTS) - set(listed_for("racecheck"))
    files = {Path(test.partition("::")[0]).stem for test in left_out}
    assert files == {
        f"test_{name}" for name in ("activation", "advance_layout", "kept_rows", "pool", "quantize", "rope")
    }
    functions = {test.partition("::")[2].partition("[")[0] for test in left_out if "rope" in test or "quantize" in test}
    assert functions == {"test_dequantize_bit_by_bit", "test_rotates_and_stores"}


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "not on the PATH"),
        ("echo '========= COMPUTE-SANITIZER'", None),
        ("echo '========= Error: No attachable process found.'", "cannot run a small program here: Error: No attach"),
        ("echo nothing works; exit 3", "cannot run a small program here: nothing works"),
        ("sleep 100", "has not run a small program in 1 s"),
    ],
)
def test_a_sanitizer_that_cannot_attach_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, message: str | None
) -> None:
    if script is not None:
        (tmp_path / "compute-sanitizer").write_text(f"#!/bin/sh\n{script.replace('sleep', 'exec sleep')}\n")
        (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(sanitize, "PROBE_SECONDS", 1)
    if message is None:
        sanitize.probe()
        return
    with pytest.raises(NotHereError, match=message):
        sanitize.probe()


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), ("DPN_RT_CUDA_ARCHITECTURES=90a-real",)), ((8, 0), ("DPN_RT_CUDA_ARCHITECTURES=80",)), (None, ())],
)
def test_kernels_are_built_for_the_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, expected: tuple[str, ...]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: capability is not None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    assert architectures() == expected
