"""The engine in a process of its own: the same answers as on a thread, and an end for every way of ending."""

from __future__ import annotations

import inspect
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dpn_rt import LLM, SamplingParams, errors
from dpn_rt.engine.engine import StepResult
from dpn_rt.engine.loader import RuntimeConfig, load_bare_engine, load_processor
from dpn_rt.errors import BatchError, CapacityError, DpnError, EngineError, RequestError, StepError
from dpn_rt.outputs import RequestOutput
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.server.stepping.engine_process import EngineProcess
from dpn_rt.server.stepping.engine_thread import EngineThread
from dpn_rt.server.stepping.messages import EngineSource
from dpn_rt.server.stepping.stepper import Stepper
from tests.server.conftest import RUNTIME, Ask

PARAMS = SamplingParams(temperature=0, max_tokens=8, logprobs=2)
LONG = SamplingParams(temperature=0, max_tokens=600, ignore_eos=True)


class Inbox:
    """What a stepper delivers."""

    def __init__(self) -> None:
        self.results: list[StepResult] = []

    def __call__(self, result: StepResult) -> None:
        self.results.append(result)

    @property
    def outputs(self) -> dict[str, RequestOutput]:
        return {output.request_id: output for result in self.results for output in result.finished}

    def token_ids(self, request_id: str) -> list[int]:
        progress = [item for result in self.results for item in result.progress if item.request_id == request_id]
        return [token_id for item in progress for token_id in item.token_ids]


def wait_until(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, inspect.getsource(condition)
        time.sleep(0.005)


@pytest.fixture(scope="module")
def source(engine_dir: Path) -> EngineSource:
    return EngineSource(engine_dir, "cpu", RUNTIME)


@pytest.fixture(scope="module")
def prompts(source: EngineSource) -> list[ProcessedPrompt]:
    processor = load_processor(source.path, source.device, source.runtime)
    return [processor.process(processor.chat(Ask(scene).local_messages)) for scene in range(3)]


@pytest.fixture
def process(source: EngineSource) -> Iterator[EngineProcess]:
    with EngineProcess(source) as process:
        process.wait_until_loaded()
        yield process


def child_of(process: EngineProcess) -> psutil.Process:
    return psutil.Process(process._process.pid)


def answers(stepper: Stepper, prompts: list[ProcessedPrompt]) -> tuple[Inbox, list[RequestOutput]]:
    inbox = Inbox()
    stepper.start(inbox)
    futures = [stepper.add(str(number), prompt, PARAMS) for number, prompt in enumerate(prompts)]
    assert [future.result(20) for future in futures] == [None] * len(prompts)
    wait_until(lambda: len(inbox.outputs) == len(prompts))
    return inbox, [inbox.outputs[str(number)] for number in range(len(prompts))]


def test_answers_are_those_of_a_thread(
    process: EngineProcess, source: EngineSource, prompts: list[ProcessedPrompt]
) -> None:
    inbox, outputs = answers(process, prompts)
    wait_until(lambda: process.load.unfinished == 0)
    assert process.load.kv_cells and process.load.image_queries == len(prompts)
    assert process.stalled_seconds == 0 and process.failure is None

    thread = EngineThread(load_bare_engine(source.path, source.device, source.runtime))
    _, expected = answers(thread, prompts)
    thread.stop()
    for output, other in zip(outputs, expected, strict=True):
        assert output.prompt_token_ids == other.prompt_token_ids
        assert output.pyramid.experts == other.pyramid.experts
        assert output.pyramid.kv_lengths == other.pyramid.kv_lengths
        (mine,), (theirs,) = output.outputs, other.outputs
        assert mine.token_ids == theirs.token_ids == inbox.token_ids(output.request_id)
        assert mine.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, abs=1e-4)


def test_what_the_engine_refuses_is_raised_here(process: EngineProcess, prompts: list[ProcessedPrompt]) -> None:
    process.start(Inbox())
    process.add("a", prompts[0], LONG).result(20)
    with pytest.raises(RequestError, match="request id 'a' is in use"):
        process.add("a", prompts[0], LONG).result(20)
    with pytest.raises(RequestError, match="stop_token_ids has 100000"):
        process.add("b", prompts[0], SamplingParams(stop_token_ids=[100_000])).result(20)
    assert process.abort("nobody").result(20) is None


def test_an_abort_gives_what_there_is_and_frees_its_cells(
    process: EngineProcess, prompts: list[ProcessedPrompt]
) -> None:
    inbox = Inbox()
    process.start(inbox)
    process.add("a", prompts[0], LONG).result(20)
    wait_until(lambda: len(inbox.token_ids("a")) > 3)
    assert process.load.kv_cells_used
    output = process.abort("a").result(20)
    assert isinstance(output, RequestOutput) and output.outputs[0].finish_reason == "abort"
    assert len(output.outputs[0].token_ids) > 3
    wait_until(lambda: process.load.unfinished == 0)
    assert process.load.running == 0


def test_a_process_that_is_killed_fails_every_call(process: EngineProcess, prompts: list[ProcessedPrompt]) -> None:
    inbox = Inbox()
    process.start(inbox)
    child = child_of(process)
    child.suspend()
    late = process.add("a", prompts[0], LONG)
    child.kill()
    with pytest.raises(StepError, match="killed by SIGKILL"):
        late.result(20)
    wait_until(lambda: inbox.results)
    assert inbox.results == [StepResult()], "an empty result tells of the failure"
    assert "killed by SIGKILL" in str(process.failure)
    with pytest.raises(StepError, match="the engine has stopped.*SIGKILL"):
        process.abort("a").result(20)


def test_calls_do_not_wait_for_a_process_that_stands_still(
    process: EngineProcess, prompts: list[ProcessedPrompt]
) -> None:
    process.start(Inbox())
    child = child_of(process)
    child.suspend()
    started = time.monotonic()
    late = [process.add(str(number), prompts[0], PARAMS) for number in range(20)]  # more than the socket holds
    assert time.monotonic() - started < 5
    wait_until(lambda: process.stalled_seconds > 0.2)
    assert not any(future.done() for future in late)
    child.resume()
    for future in late:
        future.result(20)
    wait_until(lambda: process.load.unfinished == 0)
    assert process.stalled_seconds == 0


def test_stopping_ends_the_process_in_the_middle_of_its_work(
    source: EngineSource, prompts: list[ProcessedPrompt]
) -> None:
    inbox = Inbox()
    with EngineProcess(source) as process:
        process.wait_until_loaded()
        child = child_of(process)
        process.start(inbox)
        process.add("a", prompts[0], LONG).result(20)
        wait_until(lambda: inbox.token_ids("a"))
        process.stop()
        assert not child.is_running()
        with pytest.raises(StepError, match="shutting down"):
            process.add("b", prompts[0], PARAMS).result(20)
    assert process.failure is None


def test_stopping_does_not_wait_for_a_process_that_stands_still(
    source: EngineSource, prompts: list[ProcessedPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpn_rt.server.stepping.engine_process.SECONDS_TO_END", 0.2)
    with EngineProcess(source) as process:
        process.wait_until_loaded()
        process.start(Inbox())
        child = child_of(process)
        child.suspend()
        late = process.add("a", prompts[0], PARAMS)
    assert not child.is_running()
    with pytest.raises(StepError, match="the engine has stopped: shutting down"):
        late.result(20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_the_servers_affair(
    process: EngineProcess, prompts: list[ProcessedPrompt], number: signal.Signals
) -> None:
    inbox = Inbox()
    process.start(inbox)
    os.kill(child_of(process).pid, number)
    process.add("a", prompts[0], PARAMS).result(20)
    wait_until(lambda: inbox.outputs)
    assert os.getpgid(child_of(process).pid) != os.getpgid(0), "Ctrl-C goes to the server alone"


def test_what_cannot_be_loaded_is_raised_here(source: EngineSource, tmp_path: Path) -> None:
    with EngineProcess(replace(source, path=tmp_path)) as process, pytest.raises(EngineError, match="engine.json"):
        process.wait_until_loaded()
    small = replace(source, runtime=RuntimeConfig(kv_cache_bytes=1))
    with EngineProcess(small) as process, pytest.raises(CapacityError, match="kv_cache_bytes=1"):
        process.wait_until_loaded()


def test_a_process_that_ends_while_it_loads_is_named(source: EngineSource) -> None:
    with EngineProcess(source) as process:
        child_of(process).kill()
        with pytest.raises(EngineError, match="was killed by SIGKILL while it loaded"):
            process.wait_until_loaded()


def test_every_error_may_travel() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, DpnError)]
    kinds.remove(BatchError)  # of lists of prompts, which an engine does not see
    assert len(kinds) > 10
    for kind in kinds:
        error = pickle.loads(pickle.dumps(kind("a request")))
        assert type(error) is kind and str(error) == "a request"


def test_several_completions_with_log_probabilities(process: EngineProcess, llm: LLM) -> None:
    params = [PARAMS, SamplingParams(seed=3, n=3, max_tokens=5, logprobs=1, ignore_eos=True)]
    prompt = llm.processor.process({"prompt_token_ids": [1, 20, 30]})
    expected = llm.generate([{"prompt_token_ids": [1, 20, 30]}] * 2, params, use_tqdm=False)
    inbox = Inbox()
    process.start(inbox)
    for number, each in enumerate(params):
        process.add(str(number), prompt, each).result(20)
    wait_until(lambda: len(inbox.outputs) == 2)
    for number, output in enumerate(expected):
        mine = inbox.outputs[str(number)]
        assert [c.token_ids for c in mine.outputs] == [c.token_ids for c in output.outputs]
        for one, other in zip(mine.outputs, output.outputs, strict=True):
            assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-4)
