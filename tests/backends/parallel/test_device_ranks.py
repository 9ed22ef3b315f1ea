"""Ranks on an asynchronous device: steps ahead of the host, prepared stages, and the measurement of the KV pool's size.

The host stands for the GPUs; torch.distributed and the messages are the same, but for NCCL.
"""

from __future__ import annotations

import gc
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from dpn_rt import LLM
from dpn_rt.backends.kernels import gpu
from dpn_rt.backends.parallel import group, part, start_ranks
from dpn_rt.cache.kv_pool import KvPool
from dpn_rt.errors import CapacityError, ConfigError
from tests.backends.parallel.test_answers import SHORT, prompts
from tests.engine.answers import assert_pool_is_full, assert_same
from tests.engine.models import MODEL, write_random_engine
from tests.places import HAS_GPU, CountingDevice
from tests.skips import GPU_PRESENT

pytestmark = [
    pytest.mark.usefixtures("ranks_in_threads"),
    pytest.mark.skipif(HAS_GPU, reason=GPU_PRESENT),
]


class SmallDevice(CountingDevice):
    """Does the work that is to be measured, which all ranks must do together."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.measured = number, 0

    def peak_bytes(self, work: Any) -> int:
        work()
        self.measured += 1
        return 0

    def cache_bytes(self, utilization: float, reserved: int) -> int:
        return 2**22


def test_answers_of_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[SmallDevice] = []

    def open_cuda(model: object, number: int) -> SmallDevice:
        devices.append(SmallDevice(number))
        return devices[-1]

    for module in (start_ranks, part):
        monkeypatch.setattr(module, "open_cuda", open_cuda)
    path, asked = write_random_engine(tmp_path / "e"), prompts(6)
    expected = LLM(path).generate(asked, SHORT, use_tqdm=False)
    with closing(LLM(path, device="cuda", tensor_parallel_size=2, max_num_batched_tokens=200)) as llm:
        assert sorted((device.number, device.measured) for device in devices) == [(0, 1), (1, 1)]
        assert llm.engine.runner.backend.async_device is not None
        for output, wanted in zip(llm.generate(asked, SHORT, use_tqdm=False), expected, strict=True):
            assert_same(output, wanted)
        assert_pool_is_full(llm)


def test_a_rank_without_memory_for_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pool(*arguments: Any) -> KvPool:
        if threading.current_thread() is not threading.main_thread():
            raise CapacityError("the memory has no room for a KV cache")
        return KvPool(*arguments)

    monkeypatch.setattr(part, "KvPool", pool)
    with pytest.raises(CapacityError, match="rank 1 of 2: the memory has no room for a KV cache"):
        LLM(write_random_engine(tmp_path / "e"), tensor_parallel_size=2)


@pytest.mark.parametrize("slow", [0, 1])
def test_a_rank_that_loads_longer_than_ranks_wait_in_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: int
) -> None:
    load = part.RankPart.load

    def load_slowly(*arguments: Any, **options: Any) -> part.RankPart:
        if arguments[4] == slow:
            time.sleep(1.5)
        return load(*arguments, **options)

    monkeypatch.setattr(group, "SECONDS_TO_MEET", 1)
    monkeypatch.setattr(part.RankPart, "load", load_slowly)
    with closing(LLM(write_random_engine(tmp_path / "e"), tensor_parallel_size=2)) as llm:
        assert llm.generate(prompts(1), SHORT, use_tqdm=False)[0].error is None


def test_an_error_after_all_ranks_have_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank goes on, although the error holds what was loaded."""

    def fail(*arguments: Any) -> None:
        raise ConfigError("a reducer that this version lacks")

    monkeypatch.setattr(start_ranks, "load_reducers", fail)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ConfigError, match="a reducer") as caught:
            LLM(write_random_engine(tmp_path / "e"), tensor_parallel_size=2)
        assert torch.get_num_threads() == 2, caught
        torch.set_num_threads(3)  # the caller's own affair from here on
        del caught
        gc.collect()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(num_threads)


def test_fewer_gpus_than_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(gpu, "check_model_on_cuda", lambda model: None)
    with pytest.raises(ConfigError, match="each rank takes a GPU, expected at least 2 of them, found 1"):
        gpu.open_cuda(MODEL, 1)
