"""The engine in a separate process: it gives the same answers as on a thread, and every way of ending is handled."""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dpn_rt import LLM, SamplingParams, errors
from dpn_rt.engine.loader import load_bare_engine, load_processor
from dpn_rt.errors import BatchError, CapacityError, DpnError, EngineError, RequestError, StepError
from dpn_rt.outputs import RequestOutput
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.server.engine_client.client import EngineClient
from dpn_rt.server.engine_client.messages import Abort, Add, EngineSource, Update
from dpn_rt.server.engine_client.process import EngineProcess
from dpn_rt.settings import EngineOptions
from tests.server.conftest import OPTIONS, Ask
from tests.server.local_engine import LocalEngine

PARAMS = SamplingParams(temperature=0, max_tokens=8, logprobs=2)
LONG = SamplingParams(temperature=0, max_tokens=600, ignore_eos=True)


@dataclass
class Reader:
    """A task that reads a stream to its end."""

    token_ids: list[int] = field(default_factory=list)
    output: RequestOutput | None = None
    task: asyncio.Task[None] = field(init=False)

    async def read(self, client: EngineClient, request_id: str, prompt: ProcessedPrompt, params: Any) -> None:
        async for event in client.stream(request_id, prompt, params):
            if isinstance(event, RequestOutput):
                self.output = event
            else:
                self.token_ids += [token_id for item in event for token_id in item.token_ids]

    async def ended(self) -> RequestOutput:
        await asyncio.wait_for(self.task, 20)
        assert self.output is not None
        return self.output


def read(client: EngineClient, request_id: str, prompt: ProcessedPrompt, params: SamplingParams = PARAMS) -> Reader:
    reader = Reader()
    reader.task = asyncio.create_task(reader.read(client, request_id, prompt, params))
    return reader


async def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, inspect.getsource(condition)
        await asyncio.sleep(0.005)


@asynccontextmanager
async def connected(process: EngineProcess) -> AsyncIterator[EngineClient]:
    client = EngineClient(process, None)
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


@pytest.fixture(scope="module")
def source(engine_dir: Path) -> EngineSource:
    return EngineSource(engine_dir, "cpu", OPTIONS)


@pytest.fixture(scope="module")
def prompts(source: EngineSource) -> list[ProcessedPrompt]:
    processor = load_processor(source.path, source.device, source.options)
    return [processor.process(processor.chat(Ask(scene).local_messages)) for scene in range(3)]


@pytest.fixture
def process(source: EngineSource) -> Iterator[EngineProcess]:
    with EngineProcess(source) as process:
        process.wait_until_loaded()
        yield process


def child_of(process: EngineProcess) -> psutil.Process:
    return psutil.Process(process._process.pid)


async def answers(client: EngineClient, prompts: list[ProcessedPrompt]) -> list[Reader]:
    readers = [read(client, str(number), prompt) for number, prompt in enumerate(prompts)]
    for reader in readers:
        await reader.ended()
    return readers


def test_answers_are_those_of_a_thread(
    process: EngineProcess, source: EngineSource, prompts: list[ProcessedPrompt]
) -> None:
    async def work() -> tuple[list[Reader], list[Reader]]:
        async with connected(process) as client:
            mine = await answers(client, prompts)
            await until(lambda: client.load.unfinished == 0)
            assert client.load.kv_blocks and client.load.image_queries == len(prompts)
            assert client.stalled_seconds == 0 and client.failure is None
        async with connected(LocalEngine(load_bare_engine(source.path, source.device, source.options))) as client:
            return mine, await answers(client, prompts)

    for mine, other in zip(*asyncio.run(work()), strict=True):
        assert mine.output is not None and other.output is not None
        assert mine.output.prompt_token_ids == other.output.prompt_token_ids
        assert mine.output.pyramid.experts == other.output.pyramid.experts
        assert mine.output.pyramid.kv_lengths == other.output.pyramid.kv_lengths
        (completion,), (expected,) = mine.output.outputs, other.output.outputs
        assert completion.token_ids == expected.token_ids == mine.token_ids == other.token_ids
        assert completion.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-4)


def test_what_the_engine_refuses_is_raised_here(process: EngineProcess, prompts: list[ProcessedPrompt]) -> None:
    async def work() -> None:
        async with connected(process) as client:
            first = read(client, "a", prompts[0], LONG)
            await until(lambda: first.token_ids)
            with pytest.raises(RequestError, match="request id 'a' is in use"):
                await read(client, "a", prompts[0], LONG).ended()
            with pytest.raises(RequestError, match="stop_token_ids has 100000"):
                await read(client, "b", prompts[0], SamplingParams(stop_token_ids=[100_000])).ended()
            assert client.load.running == 1 and not first.task.done(), "the other request goes on"

    asyncio.run(work())


def test_the_engine_refuses_an_id_in_use_and_ignores_an_unknown_one(
    process: EngineProcess, prompts: list[ProcessedPrompt]
) -> None:
    channel, updates = process._channel, list[Update]()
    for message in (Abort("unknown"), *[Add("a", prompts[0], LONG, 0)] * 2):
        channel.send(message)
    while not updates or "a" not in updates[-1].refused:
        updates.append(channel.receive())
    assert isinstance(updates[-1].refused["a"], RequestError) and "is in use" in str(updates[-1].refused["a"])
    assert not any(update.result.finished for update in updates)


def test_an_abort_returns_the_output_so_far_and_frees_its_blocks(
    process: EngineProcess, prompts: list[ProcessedPrompt]
) -> None:
    async def work() -> None:
        async with connected(process) as client:
            reader = read(client, "a", prompts[0], LONG)
            await until(lambda: len(reader.token_ids) > 3)
            assert client.load.kv_blocks_used
            await client.abort_all()
            output = await reader.ended()
            assert output.outputs[0].finish_reason == "abort" and len(output.outputs[0].token_ids) > 3
            await until(lambda: client.load.unfinished == 0)
            assert client.load.running == 0

    asyncio.run(work())


def test_who_leaves_a_stream_ends_its_request(process: EngineProcess, prompts: list[ProcessedPrompt]) -> None:
    async def work() -> None:
        async with connected(process) as client:
            async with aclosing(client.stream("a", prompts[0], LONG)) as events:
                await anext(events)
            with pytest.raises(RequestError, match="in use"):
                await anext(client.stream("a", prompts[0], PARAMS))
            await until(lambda: client.load.unfinished == 0 and client.stalled_seconds == 0)
            assert (await read(client, "a", prompts[0]).ended()).outputs[0].finish_reason == "length"

    asyncio.run(work())


def test_a_process_that_is_killed_fails_every_request(process: EngineProcess, prompts: list[ProcessedPrompt]) -> None:
    async def work() -> None:
        async with connected(process) as client:
            child = child_of(process)
            child.suspend()
            late = read(client, "a", prompts[0], LONG)
            await asyncio.sleep(0.05)
            child.kill()
            with pytest.raises(StepError, match="killed by SIGKILL"):
                await late.ended()
            assert "killed by SIGKILL" in str(await asyncio.wait_for(client.failed(), 20))
            assert client.stalled_seconds == float("inf")
            with pytest.raises(StepError, match="the engine has stopped.*SIGKILL"):
                await read(client, "b", prompts[0]).ended()

    asyncio.run(work())


def test_no_call_waits_for_a_process_that_stands_still(process: EngineProcess, prompts: list[ProcessedPrompt]) -> None:
    async def work() -> None:
        async with connected(process) as client:
            child = child_of(process)
            child.suspend()
            started = time.monotonic()
            late = [read(client, str(number), prompts[0]) for number in range(20)]  # more than the socket holds
            await asyncio.sleep(0)
            assert time.monotonic() - started < 5
            await until(lambda: client.stalled_seconds > 0.2)
            assert not any(reader.task.done() for reader in late)
            child.resume()
            for reader in late:
                await reader.ended()
            await until(lambda: client.load.unfinished == 0)
            assert client.stalled_seconds == 0

    asyncio.run(work())


def test_a_request_whose_reader_has_left_is_still_waited_for(
    process: EngineProcess, prompts: list[ProcessedPrompt]
) -> None:
    """A process that hangs is noticed even when all clients have given up."""

    async def work() -> None:
        async with connected(process) as client:
            child = child_of(process)
            child.suspend()
            late = read(client, "a", prompts[0], LONG)
            await asyncio.sleep(0.05)
            late.task.cancel()
            await until(lambda: late.task.done() and client.stalled_seconds > 0.2)
            child.resume()
            await until(lambda: client.stalled_seconds == 0 and client.load.unfinished == 0)

    asyncio.run(work())


def test_stopping_ends_the_process_in_the_middle_of_its_work(
    process: EngineProcess, prompts: list[ProcessedPrompt]
) -> None:
    process._channel.send(Add("a", prompts[0], LONG, 0))
    while not process._channel.receive().result.progress:
        pass
    child = child_of(process)
    process.stop()
    assert not child.is_running() and process._process.returncode == 0


def test_stopping_ends_all_requests(process: EngineProcess, prompts: list[ProcessedPrompt]) -> None:
    async def work() -> None:
        child = child_of(process)
        async with connected(process) as client:
            reader = read(client, "a", prompts[0], LONG)
            await until(lambda: reader.token_ids)
            await client.stop()
            assert not child.is_running() and process._process.returncode == 0
            assert (await reader.ended()).outputs[0].finish_reason == "abort"
            with pytest.raises(StepError, match="shutting down"):
                await read(client, "b", prompts[0]).ended()
        assert client.failure is None

    asyncio.run(work())


def test_stopping_does_not_wait_for_a_process_that_stands_still(
    process: EngineProcess, prompts: list[ProcessedPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpn_rt.server.engine_client.client.SECONDS_TO_ABORT", 0.2)
    monkeypatch.setattr("dpn_rt.server.engine_client.process.SECONDS_TO_END", 0.2)

    async def work() -> None:
        child = child_of(process)
        async with connected(process) as client:
            child.suspend()
            late = read(client, "a", prompts[0])
            await asyncio.sleep(0.05)
        assert not child.is_running()
        with pytest.raises(StepError, match="the engine has stopped: shutting down"):
            await late.ended()

    asyncio.run(work())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_the_servers_affair(
    process: EngineProcess, prompts: list[ProcessedPrompt], number: signal.Signals
) -> None:
    async def work() -> None:
        async with connected(process) as client:
            os.kill(child_of(process).pid, number)
            await read(client, "a", prompts[0]).ended()
            assert os.getpgid(child_of(process).pid) != os.getpgid(0), "Ctrl-C goes to the server alone"

    asyncio.run(work())


def test_what_cannot_be_loaded_is_raised_here(source: EngineSource, tmp_path: Path) -> None:
    with EngineProcess(replace(source, path=tmp_path)) as process, pytest.raises(EngineError, match="engine.json"):
        process.wait_until_loaded()
    assert process._process.returncode == 0
    small = replace(source, options=EngineOptions(kv_cache_bytes=1))
    with EngineProcess(small) as process, pytest.raises(CapacityError, match="kv_cache_bytes=1"):
        process.wait_until_loaded()


def test_a_process_that_ends_while_it_loads_is_named(source: EngineSource) -> None:
    with EngineProcess(source) as process:
        child_of(process).kill()
        with pytest.raises(EngineError, match="was killed by SIGKILL .*while it loaded"):
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

    async def work() -> list[RequestOutput]:
        async with connected(process) as client:
            readers = [read(client, str(number), prompt, each) for number, each in enumerate(params)]
            return [await reader.ended() for reader in readers]

    for output, other in zip(asyncio.run(work()), expected, strict=True):
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in other.outputs]
        for one, another in zip(output.outputs, other.outputs, strict=True):
            assert one.cumulative_logprob == pytest.approx(another.cumulative_logprob, abs=1e-4)
