"""Errors of a device in a step: after a lack of memory the step's requests fail, after any other error the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpn_rt import LLM, SamplingParams, ops
from dpn_rt.device import faults
from dpn_rt.engine.engine import StepResult
from dpn_rt.errors import BatchError, DeviceError, KernelArgumentError, StepError
from dpn_rt.sampling.sampler import Sampler
from dpn_rt.server.engine_client.client import EngineClient
from tests.engine.answers import assert_pool_is_full
from tests.engine.models import write_random_engine
from tests.places import HAS_GPU, Place
from tests.server.local_engine import LocalEngine
from tests.skips import GPU_PRESENT

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPT = {"prompt_token_ids": list(range(3, 20))}

NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
FATAL = [
    getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("rope_store: CUDA error cudaErrorLaunchFailure: unspecified launch failure"),
]
HARMLESS = [KernelArgumentError("pool: x has shape [3]"), ValueError("no CUDA error"), RuntimeError("shapes differ")]

pytestmark = pytest.mark.skipif(HAS_GPU, reason=GPU_PRESENT)


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_memory_that_ran_out_passes(error: Exception) -> None:
    assert faults.is_out_of_memory(error) and not faults.is_fatal(error)
    assert "gpu_memory_utilization" in faults.advice(error)


@pytest.mark.parametrize("error", FATAL, ids=str)
def test_errors_that_spoil_the_context(error: Exception) -> None:
    assert faults.is_fatal(error) and not faults.is_out_of_memory(error) and not faults.advice(error)


@pytest.mark.parametrize("error", HARMLESS, ids=str)
def test_errors_of_the_host(error: Exception) -> None:
    assert not faults.is_fatal(error) and not faults.is_out_of_memory(error) and not faults.advice(error)


@pytest.fixture
def llm(place: Place, tmp_path: Path) -> LLM:
    return place.load(write_random_engine(tmp_path / "engine"), max_chunk_tokens=8)


def raising(error: Exception) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> None:
        raise error

    return refuse


def add(llm: LLM, *names: str) -> None:
    for name in names:
        llm.engine.add_request(name, llm.processor.process(PROMPT), PARAMS)


# The part that fails, and the step that a request is in at that time.
PLACES = [(ops, "attention", "prefill"), (ops, "attention_decode", "decode"), (Sampler, "choose", "decode")]


@pytest.mark.parametrize(("owner", "name", "kind"), PLACES)
@pytest.mark.parametrize("error", NO_MEMORY[:2], ids=str)
def test_memory_runs_out_in_a_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, kind: str, error: Exception
) -> None:
    expected = llm.generate(PROMPT, PARAMS, use_tqdm=False)[0].outputs[0].token_ids
    if kind == "decode":
        add(llm, "a", "b")
        llm.engine.step()
    else:
        add(llm, "b")
        llm.engine.step()
        add(llm, "a")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raising(error))
        failed = {output.request_id: output for output in llm.engine.step().finished}
    assert set(failed) == ({"a", "b"} if kind == "decode" else {"a"})
    for output in failed.values():
        assert isinstance(output.error, StepError) and not isinstance(output.error, DeviceError)
        assert f"the {kind} step failed" in str(output.error) and "lower gpu_memory_utilization" in str(output.error)
    add(llm, "c")
    outputs = {}
    while llm.engine.num_unfinished:
        outputs.update({output.request_id: output for output in llm.engine.step().finished})
    assert all(output.outputs[0].token_ids == expected for output in outputs.values())
    assert set(outputs) == {"a", "b", "c"} - set(failed) and llm.engine.failure is None
    assert_pool_is_full(llm)


@pytest.mark.parametrize(("owner", "name", "kind"), PLACES)
@pytest.mark.parametrize("error", FATAL, ids=str)
def test_a_device_is_lost_in_a_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, kind: str, error: Exception
) -> None:
    add(llm, *"abcdefgh")  # more than can run at a time
    if kind == "decode":
        llm.engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raising(error))
        failed = llm.engine.step().finished
    assert {output.request_id for output in failed} == set("abcdefgh"), "those that wait as well"
    for output in failed:
        assert isinstance(output.error, DeviceError)
        assert f"its {kind} step failed: {error}" in str(output.error)
    for _ in range(2):
        with pytest.raises(DeviceError, match=f"its {kind} step failed"):
            add(llm, "late")
        assert llm.engine.step() == StepResult()
    with pytest.raises(DeviceError):
        llm.generate(PROMPT, PARAMS, use_tqdm=False)
    with pytest.raises(BatchError, match="the engine has stopped"):
        llm.generate([PROMPT, PROMPT], PARAMS, use_tqdm=False)
    assert_pool_is_full(llm)


def test_the_server_stops_with_the_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        client = EngineClient(LocalEngine(llm.engine), None)
        await client.start()
        monkeypatch.setattr(Sampler, "choose", raising(FATAL[0]))
        prompt = llm.processor.process(PROMPT)
        outputs = []
        with pytest.raises(DeviceError):
            async for event in client.stream("a", prompt, PARAMS):
                outputs.append(event)
        assert "DeviceError" in str(await asyncio.wait_for(client.failed(), 60))
        assert [output.request_id for output in outputs] == ["a"]
        with pytest.raises(StepError, match="the engine has stopped"):
            await anext(client.stream("b", prompt, PARAMS))
        await client.stop()

    asyncio.run(work())
