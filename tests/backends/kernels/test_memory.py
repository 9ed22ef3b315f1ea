"""The KV pool's share of a device's memory, and the errors when there is too little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dpn_rt import LLM
from dpn_rt.backends.kernels import loading
from dpn_rt.device.cuda import cache_share
from dpn_rt.device.host import HostDevice
from dpn_rt.engine import loader
from dpn_rt.errors import CapacityError, ConfigError
from tests.engine.models import kv_geometry, write_random_engine
from tests.places import HAS_GPU
from tests.skips import GPU_PRESENT

GIB = 2**30

pytestmark = pytest.mark.skipif(HAS_GPU, reason=GPU_PRESENT)


class SmallDevice(HostDevice):
    """Records the work that it has to measure, and has as much memory as a test sets."""

    def __init__(self, peak: int = 0, cache: int = 0) -> None:
        self._peak, self._cache = peak, cache
        self.measured = 0
        self.asked: list[tuple[float, int]] = []

    def peak_bytes(self, work: Callable[[], object]) -> int:
        work()
        self.measured += 1
        return self._peak

    def cache_bytes(self, utilization: float, reserved: int) -> int:
        self.asked.append((utilization, reserved))
        return self._cache


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    return write_random_engine(tmp_path / "engine")


def play(monkeypatch: pytest.MonkeyPatch, device: HostDevice) -> None:
    monkeypatch.setattr(loader, "open_cuda", lambda _: device)


def test_share_of_the_memory() -> None:
    # 80 in all, 14 of weights; 72 may be taken, 3 are reserved.
    assert cache_share(66 * GIB, 80 * GIB, 0.9, 3 * GIB) == 55 * GIB
    assert cache_share(80 * GIB, 80 * GIB, 1.0, 0) == 80 * GIB


@pytest.mark.parametrize(("free", "utilization", "reserved"), [(8, 0.9, 0), (66, 0.9, 58), (66, 0.1, 0), (0, 1.0, 0)])
def test_no_share_of_the_memory(free: int, utilization: float, reserved: int) -> None:
    with pytest.raises(CapacityError, match="no room for a KV cache: of 85,899,345,920 bytes") as caught:
        cache_share(free * GIB, 80 * GIB, utilization, reserved * GIB)
    assert f"{(80 - free) * GIB:,} are taken" in str(caught.value)
    assert f"gpu_memory_utilization={utilization}" in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "length", "limit", "image_rows"),
    [(1, 512, None, 256), (600, None, {"image": 2}, 32), (1024, 100, None, 100), (513, 512, {"image": 0}, 0)],
)
def test_the_largest_prefill_is_tried(
    monkeypatch: pytest.MonkeyPatch,
    engine_dir: Path,
    tokens: int,
    length: int | None,
    limit: dict[str, int] | None,
    image_rows: int,
) -> None:
    """And images of running sequences have their rows: 16 for each of at most 16, but no more than a prompt's rows."""
    device = SmallDevice(peak=1000, cache=2**20)
    play(monkeypatch, device)
    options = {"max_num_batched_tokens": tokens, "max_model_len": length, "limit_mm_per_prompt": limit}
    llm = LLM(engine_dir, device="cuda", reuse_bytes=50, **options)
    images = 64 * image_rows * 64 * 4  # sequences, rows, elements, bytes
    assert device.measured == 1 and device.asked == [(0.9, 1000 + images + 2 * 50)]
    cache = llm.engine.runner.cache
    assert cache.num_blocks == 2**20 // kv_geometry().block_bytes(16)


def test_a_given_size_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, engine_dir: Path) -> None:
    device = SmallDevice()
    play(monkeypatch, device)
    LLM(engine_dir, device="cuda", kv_cache_bytes=2**20)
    assert not device.measured and not device.asked


def test_no_more_than_all_sequences_need(monkeypatch: pytest.MonkeyPatch, engine_dir: Path) -> None:
    play(monkeypatch, SmallDevice(cache=2**40))
    cache = LLM(engine_dir, device="cuda", max_num_seqs=2, max_model_len=64).engine.runner.cache
    assert cache.num_blocks == 2 * 7 * (64 // 16)


def test_a_cache_that_no_longest_request_fits_into_is_told(engine_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = 7 * (64 // 16) * kv_geometry().block_bytes(16)
    LLM(engine_dir, kv_cache_bytes=full, max_model_len=64)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    LLM(engine_dir, kv_cache_bytes=full - 1, max_model_len=64)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"kv_cache_bytes={full - 1}: requests that may become as long as max_model_len=64 are refused, expected {full} "
        "bytes, or a smaller max_model_len"
    ]


def test_blocks_that_are_too_large_for_a_gpu() -> None:
    geometry = kv_geometry()
    most = (2**31 - 1) // geometry.block_bytes(1)
    loading.check_block(most, geometry)
    with pytest.raises(ConfigError, match=rf"block_size={most + 1:,}: .* expected a block_size of at most {most:,}"):
        loading.check_block(most + 1, geometry)


def test_not_even_one_block(monkeypatch: pytest.MonkeyPatch, engine_dir: Path) -> None:
    play(monkeypatch, SmallDevice(cache=100))
    with pytest.raises(CapacityError, match="kv_cache_bytes=100: expected at least 4096, one KV block"):
        LLM(engine_dir, device="cuda")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rope_table", r"ran out of memory while the largest prefill of 8192 rows .* lower max_num_batched_tokens"),
        ("KvPool", r"after [\d,]+ bytes of weights"),
    ],
)
def test_memory_that_runs_out_while_loading(
    monkeypatch: pytest.MonkeyPatch, engine_dir: Path, name: str, message: str
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    play(monkeypatch, HostDevice())
    monkeypatch.setattr(loading, name, refuse)
    with pytest.raises(CapacityError, match=message) as caught:
        LLM(engine_dir, device="cuda")
    assert "Tried to allocate 2.00 GiB" in str(caught.value)


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, engine_dir: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    play(monkeypatch, HostDevice())
    monkeypatch.setattr(torch.Tensor, "to", refuse)
    with pytest.raises(CapacityError, match=r"no room for [\d,]+ bytes of weights"):
        LLM(engine_dir, device="cuda")


@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 5), (1 << 20, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_on_the_host_is_plain_memory(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pool = HostDevice().pool(shape, dtype)
    assert pool.shape == shape and pool.dtype == dtype and pool.is_contiguous()
    values = torch.randn(shape).to(dtype)
    assert torch.equal(pool.copy_(values), values)


@pytest.mark.parametrize("num_bytes", [1 << 60, 1 << 70])
def test_pool_that_is_too_large(num_bytes: int) -> None:
    with pytest.raises((MemoryError, RuntimeError)):
        HostDevice().pool((num_bytes,), torch.uint8)
