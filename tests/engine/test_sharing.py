"""One `LLM` for several threads, its end, and children of the process that loaded it."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.engine.engine import StepResult
from dpn_rt.engine.turns import Turns
from dpn_rt.errors import BatchError, StepError
from dpn_rt.outputs import RequestOutput
from tests.engine.answers import all_logprobs, assert_ids_are
from tests.engine.models import random_prompt, write_random_engine

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
THREADS, CALLS = 6, 5


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_engine(tmp_path_factory.mktemp("engines") / "adaptive")


@pytest.fixture(scope="module")
def llm(engine_dir: Path) -> LLM:
    return LLM(engine_dir, max_num_seqs=4)


def prompts(count: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(torch.initial_seed())
    return [random_prompt(generator, (4, 4)) for _ in range(count)]


def streamed(llm: LLM, prompt: Any) -> list[int]:
    pieces = list(llm.stream(prompt, GREEDY))
    assert [piece.output is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    return [token for piece in pieces for token in piece.token_ids]


def assert_answers(ids: list[int], expected: RequestOutput) -> None:
    assert_ids_are(ids, expected.outputs[0].token_ids, all_logprobs(expected))


def test_threads_get_their_own_answers(llm: LLM) -> None:
    asked = prompts(THREADS * CALLS)
    expected = llm.generate(asked, dataclasses.replace(GREEDY, logprobs=-1), use_tqdm=False)
    sizes: list[int] = []
    schedule = llm.engine._scheduler.schedule

    def noted() -> Any:
        batch = schedule()
        sizes.append(0 if batch is None else len(batch.sequences))
        return batch

    def ask(thread: int) -> None:
        for call in range(CALLS):
            number = thread * CALLS + call
            if (thread + call) % 2:
                ids = streamed(llm, asked[number])
            else:
                ids = llm.generate(asked[number], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
            assert_answers(ids, expected[number])

    with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(THREADS) as pool:
        patched.setattr(llm.engine._scheduler, "schedule", noted)
        for each in [pool.submit(ask, thread) for thread in range(THREADS)]:
            each.result(timeout=60)
    assert max(sizes) > 1, "requests of several threads were never in one batch"
    assert llm.engine.num_unfinished == llm.engine.num_running == 0


def test_a_thread_does_not_pass_one_that_waits() -> None:
    turns, order = Turns(), []
    waits = threading.Event()

    def other() -> None:
        waits.set()
        with turns.turn():
            order.append("other")

    thread = threading.Thread(target=other)
    with turns.turn():
        thread.start()
        assert waits.wait(10)
        deadline = time.monotonic() + 10
        while not turns._next.locked():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        order.append("first")
    with turns.turn():
        order.append("first again")
    thread.join(10)
    assert order == ["first", "other", "first again"]


def test_a_stream_that_is_dropped_within_a_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may close it anywhere: its blocks are free after the step, which goes on."""
    asked = prompts(2)
    (expected,) = llm.generate(asked[1], dataclasses.replace(GREEDY, logprobs=-1), use_tqdm=False)
    dropped, step = llm.stream(asked[0], GREEDY), llm.engine.step
    next(dropped)

    def drops() -> StepResult:
        running = llm.engine.num_running
        dropped.close()
        assert llm.engine.num_running == running, "a request ended in the middle of a step"
        return step()

    monkeypatch.setattr(llm.engine, "step", drops)
    stream = llm.stream(asked[1], GREEDY)
    first = next(stream)
    monkeypatch.undo()
    assert llm.engine.num_running == 1
    assert_answers([*first.token_ids, *(token for piece in stream for token in piece.token_ids)], expected)
    assert llm.engine.num_unfinished == llm.engine.num_running == 0


def test_an_llm_that_was_closed_answers_no_more(engine_dir: Path) -> None:
    (prompt,) = prompts(1)
    with LLM(engine_dir) as llm:
        assert isinstance(llm.generate(prompt, GREEDY, use_tqdm=False)[0], RequestOutput)
    llm.close()
    calls: list[Callable[[], Any]] = [
        lambda: llm.generate(prompt, GREEDY, use_tqdm=False),
        lambda: list(llm.stream(prompt, GREEDY)),
    ]
    for call in calls:
        with pytest.raises(StepError, match="^the engine was closed: expected a new one$"):
            call()
    with pytest.raises(BatchError, match="the engine was closed"):
        llm.generate([prompt, prompt], GREEDY, use_tqdm=False)


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_cannot_be_copied(llm: LLM, copied: Callable[[LLM], object]) -> None:
    with pytest.raises(TypeError, match="^an LLM cannot be copied or sent to another process: load its engine there$"):
        copied(llm)


def test_a_child_of_the_process_is_refused(llm: LLM) -> None:
    """It has no threads of the kernels, and would wait for them without an end."""
    (prompt,) = prompts(1)
    unfinished = llm.stream(prompt, GREEDY)
    next(unfinished)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        status = 0
        for call in (
            lambda: llm.generate(prompt, GREEDY, use_tqdm=False),
            lambda: list(llm.stream(prompt, GREEDY)),
            lambda: list(unfinished),
        ):
            try:
                call()
                status = 1
            except StepError as error:
                status |= 2 * (f"was loaded by process {os.getppid()}" not in str(error))
        llm.close()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(list(unfinished)) == GREEDY.max_tokens - 1
    assert llm.generate(prompt, GREEDY, use_tqdm=False)
