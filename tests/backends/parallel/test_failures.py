"""Every way in which ranks can fail, with threads in the place of their processes. No failure hangs."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dpn_rt import LLM, SamplingParams
from dpn_rt.backends.parallel import group, processes, worker
from dpn_rt.backends.parallel.calls import Call
from dpn_rt.backends.parallel.messages import RankFailed
from dpn_rt.backends.parallel.part import RankExecutor
from dpn_rt.device.packing import Packing
from dpn_rt.engine import loader
from dpn_rt.errors import DeviceError, EngineError
from dpn_rt.format.engine_dir import EngineDir, EngineSource, write_engine
from tests.backends.parallel.conftest import RankThread
from tests.engine.models import MODEL, random_weights, write_random_engine

PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
TEXT = {"prompt_token_ids": [1, 7, 8, 9]}
POOL = {"kv_cache_bytes": 2**22}


def two_ranks(tmp_path: Path) -> LLM:
    return LLM(write_random_engine(tmp_path / "e"), tensor_parallel_size=2, **POOL)


def rebuild(path: Path) -> None:
    """Another engine with weights of the same names and shapes."""
    write_engine(path, MODEL, EngineSource("1" * 64, "original"), random_weights(MODEL, seed=1), {}, force=True)


def on_rank_1(method: Callable[..., Any]) -> Callable[..., Any]:
    """What rank 0 does is left as it is."""
    original = getattr(RankExecutor, method.__name__)

    def called(*arguments: Any) -> Any:
        is_rank_0 = threading.current_thread() is threading.main_thread()
        return (original if is_rank_0 else method)(*arguments)

    return called


def test_a_rank_that_has_ended(tmp_path: Path, ranks_in_threads: list[RankThread]) -> None:
    """All requests are told, and the engine takes no more."""
    llm = two_ranks(tmp_path)
    for name in ("a", "b"):
        llm.engine.add_request(name, llm.processor.process(TEXT), PARAMS)
    assert len(llm.engine.step().progress) == 2
    ranks_in_threads[0].lose_pipe()
    finished = llm.engine.step().finished
    assert sorted(output.request_id for output in finished) == ["a", "b"]
    for output in finished:
        assert isinstance(output.error, DeviceError)
        assert "rank 1 of 2 failed: its process ended with status 0" in str(output.error)
    with pytest.raises(DeviceError, match="the engine has stopped"):
        llm.engine.add_request("d", llm.processor.process(TEXT), PARAMS)


def test_a_rank_that_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks_in_threads: list[RankThread]
) -> None:
    """Ranks wait for each other for a bounded time."""

    def decode(*arguments: Any) -> None:
        assert ranks_in_threads[0].killed.wait(60)
        raise SystemExit

    monkeypatch.setattr(group, "SECONDS_TO_MEET", 1)
    monkeypatch.setattr(processes, "SECONDS_TO_FAIL", 0.5)
    monkeypatch.setattr(RankExecutor, "decode", on_rank_1(decode))
    with pytest.raises(DeviceError, match="the 2 ranks of the engine are out of step"):
        two_ranks(tmp_path).generate(TEXT, PARAMS, use_tqdm=False)


@pytest.mark.usefixtures("ranks_in_threads")
def test_an_error_of_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says why, and rank 0 does not wait for it."""

    def decode(*arguments: Any) -> None:
        raise ValueError("a cause")

    monkeypatch.setattr(RankExecutor, "decode", on_rank_1(decode))
    with pytest.raises(DeviceError, match="rank 1 of 2 failed: ValueError.*a cause"):
        two_ranks(tmp_path).generate(TEXT, PARAMS, use_tqdm=False)


@pytest.mark.usefixtures("ranks_in_threads")
def test_an_early_end_of_a_pickle(tmp_path: Path) -> None:
    """An EOFError of a rank's own work does not count as the end of rank 0."""
    llm = two_ranks(tmp_path)
    executor = llm.engine.runner.backend.executor
    executor._ranks.send(Call("embed", b"", Packing((), (), (), 0)))
    with pytest.raises(DeviceError, match="rank 1 of 2 failed: EOFError"):
        llm.generate(TEXT, PARAMS, use_tqdm=False)


def test_a_pipe_that_is_lost_in_the_middle_of_a_message(capfd: pytest.CaptureFixture[str]) -> None:
    """That is the end of rank 0, not an error of this rank."""
    here, there = Pipe()
    os.write(here.fileno(), b"\0\0\0\x09half")
    here.close()
    assert worker.run(there) == 0
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("size", [1, 2])
def test_an_engine_that_is_built_again_while_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks_in_threads: list[RankThread], size: int
) -> None:
    """With the same names and shapes. Nothing is left that runs."""
    path = write_random_engine(tmp_path / "e")
    check = loader.check_device

    def build_again(*arguments: Any) -> None:
        check(*arguments)
        rebuild(path)

    monkeypatch.setattr(loader, "check_device", build_again)
    with pytest.raises(EngineError, match="e: weights.safetensors is another file than when the engine was opened"):
        LLM(path, tensor_parallel_size=size, **POOL)
    assert not ranks_in_threads


def test_other_files_on_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks_in_threads: list[RankThread]
) -> None:
    """The engine is built again once rank 0 has loaded its part."""
    path, rank_0_has_loaded = write_random_engine(tmp_path / "e"), threading.Semaphore(0)
    load = EngineDir.load_weights

    def load_weights(engine: EngineDir) -> dict[str, Tensor]:
        if threading.current_thread() is threading.main_thread():
            weights = load(engine)
            rank_0_has_loaded.release()
            return weights
        assert all(rank_0_has_loaded.acquire(timeout=60) for _ in range(2))
        rebuild(path)
        return load(engine)

    monkeypatch.setattr(EngineDir, "load_weights", load_weights)
    with pytest.raises(EngineError, match="rank 1 of 2: .*e: weights.safetensors is another file"):
        LLM(path, tensor_parallel_size=2, **POOL)
    assert [thread.poll() for thread in ranks_in_threads] == [1]


@pytest.mark.usefixtures("ranks_in_threads")
def test_a_process_that_was_forked(tmp_path: Path) -> None:
    """It may have a copy of the engine, but its ranks are told by one process alone."""
    llm = two_ranks(tmp_path)
    llm.engine.runner.backend.executor._ranks._owner -= 1
    with pytest.raises(DeviceError, match="was forked from the one that loaded the engine"):
        llm.generate(TEXT, PARAMS, use_tqdm=False)


@pytest.mark.parametrize("name", ["Popen", "mkdtemp"])
def test_processes_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    path = write_random_engine(tmp_path / "e")
    monkeypatch.setattr(processes.subprocess if name == "Popen" else processes.tempfile, name, refuse)
    with pytest.raises(EngineError, match="the processes of 2 ranks cannot be started: .*temporarily unavailable"):
        LLM(path, tensor_parallel_size=2, **POOL)


class Ended:
    """A process that has ended, although its pipe is open in another one."""

    def poll(self) -> int:
        return 3

    def wait(self, timeout: float | None = None) -> int:
        return 3

    def kill(self) -> None:
        """There is nothing to do."""


@pytest.fixture
def pipes() -> Iterator[list[Connection]]:
    """The ranks' ends of the pipes of `ranks_of`."""
    kept: list[Connection] = []
    yield kept
    for end in kept:
        end.close()


def ranks_of(pipes: list[Connection], messages: dict[int, object]) -> processes.RankProcesses:
    """Ranks that have sent these messages, and have ended."""
    ranks = processes.RankProcesses(1)
    for number, message in messages.items():
        here, there = Pipe()
        pipes.append(there)
        if message is not None:
            there.send(message)
        ranks._ranks.append(processes.RankProcess(number, Ended(), here))  # type: ignore[arg-type]
    return ranks


def test_the_rank_that_failed_first_is_named(pipes: list[Connection]) -> None:
    """Others fail because of it: their connections to it are closed."""
    ranks = ranks_of(pipes, {1: RankFailed("connection closed", 2.0), 2: RankFailed("ValueError: a cause", 1.0)})
    assert "rank 2 of 1 failed: ValueError: a cause" in str(ranks.failure(RuntimeError("connection closed")))
    ranks.end()


def test_a_death_is_seen_although_the_pipe_is_open(pipes: list[Connection], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that was forked while the rank was started."""
    monkeypatch.setattr(processes, "SECONDS_TO_FAIL", 0.1)
    ranks = ranks_of(pipes, {1: None})
    with pytest.raises(EngineError, match="rank 1 of 1 could not load the engine: its process ended with status 3"):
        ranks.wait_until_loaded()
    assert "rank 1 of 1 failed: its process ended with status 3" in str(ranks.failure(RuntimeError("timeout")))
    ranks.end()
