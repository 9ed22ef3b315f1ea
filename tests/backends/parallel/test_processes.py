"""Ranks as processes: the trained model, memory, and every way in which they can fail. No failure hangs."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Pipe
from pathlib import Path

import pytest

from dpn_rt import LLM, SamplingParams
from dpn_rt.backends.parallel import processes
from dpn_rt.backends.parallel.executor import ParallelExecutor
from dpn_rt.backends.parallel.messages import RankFailed
from dpn_rt.builders.native import build_engine
from dpn_rt.errors import DeviceError, EngineError, StepError
from examples.tiny_dpn.answers import chat_messages
from examples.tiny_dpn.data import sample
from tests.engine.models import write_random_engine
from tests.engine.test_batching import all_logprobs, assert_same

CHECKPOINT = Path(__file__).parents[3] / "examples" / "tiny_dpn" / "checkpoint"
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, logprobs=-1, ignore_eos=True)
TEXT = {"prompt_token_ids": [1, 7, 8, 9]}
POOL = {"kv_cache_bytes": 2**22}


def rank_processes(llm: LLM) -> list[int]:
    executor = llm.engine.runner.backend._executor
    assert isinstance(executor, ParallelExecutor)
    return executor.ranks.process_ids


def has_ended(process_id: int) -> bool:
    """Within some seconds."""
    for _ in range(200):
        try:
            os.kill(process_id, 0)
            if Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_the_trained_model(tmp_path: Path) -> None:
    """Same routes and answers, log-probabilities within 1e-4; and the other process ends with the engine."""
    build_engine(CHECKPOINT, tmp_path / "e", dtype="float32")
    asked = sample("test", 11)
    conversations = [chat_messages(asked.image, question.text) for question in asked.questions]
    expected = LLM(tmp_path / "e", **POOL).chat(conversations, PARAMS)
    llm = LLM(tmp_path / "e", tensor_parallel_size=2, **POOL)
    (process_id,) = rank_processes(llm)
    outputs = llm.chat(conversations, PARAMS)
    assert len({tuple(output.pyramid.experts) for output in outputs}) > 1, "questions take several routes"
    for output, wanted in zip(outputs, expected, strict=True):
        assert_same(output, wanted)
        assert output.outputs[0].text == wanted.outputs[0].text
        assert (all_logprobs(output) - all_logprobs(wanted)).abs().max() <= 1e-4
    llm.close()
    llm.close()
    assert has_ended(process_id)
    with pytest.raises(StepError, match="the engine was closed"):
        llm.generate(TEXT, PARAMS, use_tqdm=False)


@pytest.mark.parametrize("when", ["idle", "in a step"])
def test_a_rank_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """All requests are told, and the engine takes no more."""
    llm = LLM(write_random_engine(tmp_path / "e"), tensor_parallel_size=2, **POOL)
    (process_id,) = rank_processes(llm)
    for name in ("a", "b"):
        llm.engine.add_request(name, llm.processor.process(TEXT), PARAMS)
    assert len(llm.engine.step().progress) == 2
    if when == "idle":
        os.kill(process_id, signal.SIGKILL)
    else:
        local = llm.engine.runner.backend._executor._local
        decode = local.decode

        def decode_after_death(*arguments: object) -> object:  # the other rank has the call, and waits in a sum
            os.kill(process_id, signal.SIGKILL)
            return decode(*arguments)

        monkeypatch.setattr(local, "decode", decode_after_death)
    llm.engine.add_request("c", llm.processor.process(TEXT), PARAMS)
    finished = [output for _ in range(3) for output in llm.engine.step().finished]
    assert sorted(output.request_id for output in finished) == ["a", "b", "c"]
    for output in finished:
        assert isinstance(output.error, DeviceError)
        assert "rank 1 of 2 failed: its process was killed by SIGKILL" in str(output.error)
    assert llm.engine.failure is not None
    with pytest.raises(DeviceError, match="the engine has stopped"):
        llm.engine.add_request("d", llm.processor.process(TEXT), PARAMS)
    assert has_ended(process_id)


def test_a_rank_that_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks wait for each other for a bounded time."""
    from dpn_rt.backends.parallel import group

    monkeypatch.setattr(group, "SECONDS_TO_MEET", 2)
    monkeypatch.setattr(processes, "SECONDS_TO_FAIL", 0.5)
    llm = LLM(write_random_engine(tmp_path / "e"), tensor_parallel_size=2, **POOL)
    (process_id,) = rank_processes(llm)
    os.kill(process_id, signal.SIGSTOP)
    with pytest.raises(DeviceError, match="the 2 ranks of the engine are out of step"):
        llm.generate(TEXT, PARAMS, use_tqdm=False)
    assert has_ended(process_id)


def test_an_error_of_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says why, and ends."""
    llm = LLM(write_random_engine(tmp_path / "e"), tensor_parallel_size=2, **POOL)
    llm.engine.runner.backend._executor._group.broadcast = lambda block: None  # so that tensors do not come
    executor = llm.engine.runner.backend._executor
    executor.ranks.send("no call")
    with pytest.raises(DeviceError, match="rank 1 of 2 failed: .*AttributeError"):
        llm.generate(TEXT, PARAMS, use_tqdm=False)


def test_other_files_on_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that was built again while it was loaded: nothing is left that runs."""
    path, other = (write_random_engine(tmp_path / name, seed=seed) for name, seed in (("e", 0), ("other", 1)))
    started: list[processes.RankProcesses] = []
    send = processes.RankProcesses.send_sources

    def send_other(ranks: processes.RankProcesses, sources: list[processes.RankSource]) -> None:
        started.append(ranks)
        for source in sources:
            object.__setattr__(source, "path", other)
        send(ranks, sources)

    monkeypatch.setattr(processes.RankProcesses, "send_sources", send_other)
    with pytest.raises(EngineError, match=r"rank 1 of 2: .*other: its engine.json or .* differs from what rank 0"):
        LLM(path, tensor_parallel_size=2, **POOL)
    assert all(has_ended(process_id) for process_id in started[0].process_ids)
    assert not started[0].directory.exists()


def test_ranks_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    path = write_random_engine(tmp_path / "e")
    code = (
        "import os, signal, sys; from dpn_rt import LLM\n"
        f"llm = LLM({str(path)!r}, tensor_parallel_size=2, kv_cache_bytes=2**22)\n"
        "print(*llm.engine.runner.backend._executor.ranks.process_ids, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    killed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stdout and all(has_ended(int(process_id)) for process_id in killed.stdout.split())
    assert not list(temporary.glob("dpn-rt-*"))


def test_a_rank_imports_from_where_the_first_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the working directory only if that one does."""
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    rank = processes._start(1)
    rank.pipe.close()
    assert rank.process.wait(60) == 0


@pytest.mark.parametrize("name", ["Popen", "mkdtemp"])
def test_processes_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    llm = write_random_engine(tmp_path / "e")
    monkeypatch.setattr(processes.subprocess if name == "Popen" else processes.tempfile, name, refuse)
    with pytest.raises(EngineError, match="the processes of 2 ranks cannot be started: .*temporarily unavailable"):
        LLM(llm, tensor_parallel_size=2, **POOL)


def test_the_rank_that_failed_first_is_named() -> None:
    """Others fail because of it: their connections to it are closed."""
    ranks = processes.RankProcesses(1)
    for number, message in ((1, RankFailed("connection closed", 2.0)), (2, RankFailed("ValueError: a cause", 1.0))):
        here, there = Pipe()
        there.send(message)
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        ranks._ranks.append(processes.RankProcess(number, ended, here))
    assert "rank 2 of 1 failed: ValueError: a cause" in str(ranks.failure(RuntimeError("connection closed")))
    ranks.end()
