"""Ranks as processes: the trained model, death, and what they leave behind. `test_failures.py` has other failures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpn_rt import LLM, SamplingParams
from dpn_rt.backends.parallel.parallel_executor import ParallelExecutor
from dpn_rt.builders.native import build_engine
from dpn_rt.errors import DeviceError, StepError
from examples.tiny_dpn.answers import chat_messages
from examples.tiny_dpn.data import sample
from tests.engine.answers import all_logprobs, assert_same
from tests.engine.models import write_random_engine

CHECKPOINT = Path(__file__).parents[3] / "examples" / "tiny_dpn" / "checkpoint"
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, logprobs=-1, ignore_eos=True)
TEXT = {"prompt_token_ids": [1, 7, 8, 9]}
POOL = {"kv_cache_bytes": 2**22}


def rank_processes(llm: LLM) -> list[int]:
    executor = llm.engine.runner.backend.executor
    assert isinstance(executor, ParallelExecutor)
    return executor.process_ids


def has_ended(process_id: int, seconds: float = 10) -> bool:
    """Within some seconds."""
    for _ in range(1 + int(20 * seconds)):
        try:
            os.kill(process_id, 0)
            if Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_the_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same routes and answers, log-probabilities within 1e-4; and the other process ends with the engine.

    It imports from where this process does, and from the working directory only if this one does.
    """
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
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


def test_a_rank_that_dies_in_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests are told, and the engine takes no more."""
    llm = LLM(write_random_engine(tmp_path / "e"), tensor_parallel_size=2, **POOL)
    (process_id,) = rank_processes(llm)
    for name in ("a", "b"):
        llm.engine.add_request(name, llm.processor.process(TEXT), PARAMS)
    assert len(llm.engine.step().progress) == 2
    local = llm.engine.runner.backend.executor._local
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
    assert has_ended(process_id)


def test_ranks_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    """Also where a child that was forked from it goes on."""
    path = write_random_engine(tmp_path / "e")
    code = (
        "import os, signal, sys, time; from dpn_rt import LLM\n"
        f"llm = LLM({str(path)!r}, tensor_parallel_size=2, kv_cache_bytes=2**22)\n"
        "print(*llm.engine.runner.backend.executor.process_ids, flush=True)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os.closerange(0, 3)\n"
        "    time.sleep(60)\n"
        "    os._exit(0)\n"
        "print(child, flush=True)\n"
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
    *process_ids, child = map(int, killed.stdout.split())
    try:
        assert process_ids and all(has_ended(process_id) for process_id in process_ids)
        assert not has_ended(child, seconds=0)
    finally:
        os.kill(child, signal.SIGKILL)
    assert not list(temporary.glob("dpn-rt-*"))
