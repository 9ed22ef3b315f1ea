"""Recorded decode steps and vision towers give every batch the same result as the code that they recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpn_rt import LLM, SamplingParams
from dpn_rt.backends.kernels.backend import KernelBackend
from dpn_rt.backends.kernels.decode_graphs import DecodeGraphs, batch_sizes
from dpn_rt.backends.kernels.decode_step import PlainDecodeStep
from dpn_rt.backends.kernels.encoder_graphs import EncoderGraphs
from dpn_rt.cache.block_allocator import BlockAllocator
from dpn_rt.device import cuda
from dpn_rt.device.host import HostDevice, RepeatedStep
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.vision.encoder import ImageEncoder
from tests.engine.models import MODEL, VOCAB_SIZE, random_images, write_random_engine
from tests.places import HAS_GPU, Place
from tests.skips import GPU_PRESENT, NO_GPU

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


def with_dtype(place: Place) -> ModelConfig:
    return dataclasses.replace(MODEL, dtype=place.dtype)


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (16, [1, 2, 4, 8, 16]),
        (17, [1, 2, 4, 8, 16, 17]),
        (33, [1, 2, 4, 8, 16, 24, 32, 33]),
    ],
)
def test_batch_sizes(limit: int, sizes: list[int]) -> None:
    assert list(batch_sizes(limit)) == sizes


def test_a_repeated_step_keeps_its_outputs_in_place() -> None:
    source = torch.zeros(3)
    graph = RepeatedStep(lambda: (source + 1, source * 2))
    addresses = [output.data_ptr() for output in graph.outputs]
    source.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert graph.outputs[0].tolist() == [1, 1, 1], "nothing happens before it is asked for"
    graph.replay()
    assert [output.data_ptr() for output in graph.outputs] == addresses
    assert [output.tolist() for output in graph.outputs] == [[2, 3, 4], [2, 4, 6]]


@pytest.fixture
def filled(place: Place, tmp_path: Path) -> Iterator[tuple[LLM, KernelBackend, BlockAllocator, np.ndarray]]:
    """Six sequences of 14 to 19 rows of text, and room for one more."""
    llm = place.load(write_random_engine(tmp_path / "engine", with_dtype(place)), block_size=4)
    cache = llm.engine.runner.cache
    assert isinstance(cache, BlockAllocator)
    backend = llm.engine.runner.backend
    assert isinstance(backend, KernelBackend)
    backend.executor.pool.blocks.fill_(torch.nan)  # the memory may still hold the same rows from an earlier test
    for name in range(6):
        ids = [(7 * name + i) % 90 + 3 for i in range(14 + name)]
        llm.engine.add_request(str(name), llm.processor.process({"prompt_token_ids": ids}), GREEDY)
    llm.engine.step()
    slots = np.array([s.slot for s in llm.engine._scheduler._running])
    cache.grow(slots)
    yield llm, backend, cache, slots


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_padding_changes_nothing(filled: tuple[LLM, KernelBackend, BlockAllocator, np.ndarray], count: int) -> None:
    """The padding block may hold anything. Only each sequence's new row and that block are written."""
    _, backend, cache, slots = filled
    chosen, token_ids = slots[:count], np.arange(count) + 11
    blocks = backend.executor.pool.blocks
    blocks[-1] = torch.nan
    before = blocks.clone()
    with torch.inference_mode():
        decoded = backend.decode(token_ids, chosen)
    logits, best = decoded.logits.clone(), decoded.best
    assert logits.shape == (count, VOCAB_SIZE) and logits.isfinite().all() and best is not None
    assert torch.equal(best, logits.float().argmax(dim=1))
    changed = (blocks.view(torch.uint8) != before.view(torch.uint8)).flatten(1).any(dim=1)
    lengths = cache.kv_lengths(chosen)
    written = {
        int(block)
        for stage in range(lengths.shape[1])
        for seq, table in enumerate(cache.block_tables(stage, chosen).transpose(1, 0, 2))
        for block in table[:, (lengths[seq, stage] - 1) // 4]
    }
    assert {int(block) for block in changed.nonzero()} - {len(blocks) - 1} == written
    blocks.copy_(before)
    with torch.inference_mode():
        plain = PlainDecodeStep(backend.executor, cache, backend._device)
        if not blocks.is_cuda:
            torch.testing.assert_close(plain.run(token_ids, chosen).logits, logits, atol=1e-5, rtol=1e-5)
        for row in range(count):
            blocks.copy_(before)
            alone = backend.decode(token_ids[row : row + 1], chosen[row : row + 1]).logits
            tolerance = 0.1 if blocks.is_cuda else 1e-5
            torch.testing.assert_close(alone[0], logits[row], atol=tolerance, rtol=tolerance)


def test_a_step_is_one_transfer_each_way_and_no_recording(place: Place, tmp_path: Path) -> None:
    if place.device is None:
        pytest.skip(GPU_PRESENT)
    llm = place.load(write_random_engine(tmp_path / "engine"))
    for name in range(6):
        llm.engine.add_request(str(name), llm.processor.process({"prompt_token_ids": [1, 2 + name]}), GREEDY)
    for _ in range(2):  # the prefill, and a step that queues another one after its own
        llm.engine.step()
    before = place.device.uploads, place.device.readings, place.device.recordings
    llm.engine.step()
    after = place.device.uploads, place.device.readings, place.device.recordings
    assert after == (before[0] + 1, before[1] + 1, before[2])
    assert llm.engine.num_running == 6


def test_logits_that_are_not_finite_are_told(filled: tuple[LLM, KernelBackend, BlockAllocator, np.ndarray]) -> None:
    _, backend, cache, slots = filled
    blocks = [cache.block_tables(stage, slots[1:2]).flatten() for stage in range(4)]
    for number in np.concatenate(blocks):
        if number >= 0:
            backend.executor.pool.blocks[number] = torch.nan
    with torch.inference_mode():
        best = backend.decode(np.arange(3) + 11, slots[:3]).best
    assert best is not None and best[1] == -1 and (best[[0, 2]] >= 0).all()


WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "where.Scalar")
"""Parts of the names of torch's operators that read a result on the host, or take a number from the host."""


class OperatorNames(TorchDispatchMode):
    """Collects the operators that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_recorded_steps_can_be_recorded(filled: tuple[LLM, KernelBackend, BlockAllocator, np.ndarray]) -> None:
    """Steps wait for no result and make no tensor from the host's numbers: a GPU could not record either."""
    llm, backend, _, _ = filled
    encoder = llm.engine.runner.images.encoder
    assert isinstance(encoder, EncoderGraphs)
    graphs = backend._step
    assert isinstance(graphs, DecodeGraphs)
    steps = [graph._step for graph in graphs._graphs.values()]
    for step in (*steps, *(graph._step for graph in encoder._graphs.values())):
        with OperatorNames() as operators:
            step()
        assert len(operators.names) > 5, "saw nothing"
        assert not [name for name in operators.names if any(part in name for part in WAITS)]


@pytest.mark.parametrize("count", range(1, 10))
def test_any_number_of_images(place: Place, tmp_path: Path, count: int) -> None:
    runner = place.load(write_random_engine(tmp_path / "engine", with_dtype(place))).engine.runner
    encoder = runner.images.encoder
    assert isinstance(encoder, EncoderGraphs)
    images = random_images(count)
    with torch.inference_mode():
        rows = [encoded.rows for encoded in runner.images.encoder.encode(images)]
        kept = [row.clone() for row in rows]
        runner.images.encoder.encode(images[::-1])  # must not change earlier results
        moved = [dataclasses.replace(image, views=(image.views[0].to(rows[0].device),)) for image in images]
        expected = ImageEncoder(encoder._encoder).encode(moved)
    assert len(rows) == count
    for row, copy, wanted in zip(rows, kept, expected, strict=True):
        assert torch.equal(row, copy)
        torch.testing.assert_close(row, wanted.rows, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason=NO_GPU)
def test_graphs_equal_eager_launches_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = write_random_engine(tmp_path / "engine", dataclasses.replace(MODEL, dtype="bfloat16"))
    prompts = [{"prompt_token_ids": list(range(3, 20 + n))} for n in range(5)]
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=-1, ignore_eos=True)
    options = {"device": "cuda", "max_num_seqs": 6, "max_graph_rows": 128}
    recorded = LLM(engine, **options).generate(prompts, params, use_tqdm=False)
    monkeypatch.setattr(cuda.CudaDevice, "record", HostDevice.record)
    launched = LLM(engine, **options).generate(prompts, params, use_tqdm=False)
    for output, other in zip(recorded, launched, strict=True):
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
        for position, expected in zip(output.outputs[0].logprobs or (), other.outputs[0].logprobs or (), strict=True):
            assert [position[i] for i in range(VOCAB_SIZE)] == [expected[i] for i in range(VOCAB_SIZE)]
