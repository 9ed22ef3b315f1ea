"""Decode steps of the host, recorded: the same bits as kernel after kernel gives, whatever happens between steps."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.backends.backend import Decoded
from dpn_rt.backends.kernels.backend import KernelBackend
from dpn_rt.backends.kernels.decode_step import PlainDecodeStep
from dpn_rt.backends.kernels.host_decode_graphs import MOST_RECORDED_ROWS, HostDecodeGraphs
from dpn_rt.errors import KernelArgumentError
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.weights import product
from dpn_rt.outputs import RequestOutput
from dpn_rt.tuning.cpu_choices import cpu_choices, default_choices
from tests.engine.models import MODEL, kv_bytes, random_prompt, with_decoder, write_random_engine
from tests.engine.quantized_models import write_quantized_engine

MODELS = {
    "float32": MODEL,
    "bfloat16": replace(MODEL, dtype="bfloat16"),
    "int8": replace(MODEL, dtype="bfloat16", quantize="int8"),
    "int4": replace(MODEL, quantize="int4"),
    "biases, normed heads": with_decoder(MODEL, qkv_bias=True, o_bias=True, qk_norm=True, num_kv_heads=1),
    "shared embedding": with_decoder(MODEL, tie_word_embeddings=True),
}
WINDOWS = with_decoder(MODEL, windows=(None, 20, 9, 20, 1, None, 33))


def load(path: Path, model: ModelConfig = MODEL, **options: int) -> tuple[LLM, HostDecodeGraphs]:
    write = write_random_engine if model.quantize == "none" else write_quantized_engine
    llm = LLM(write(path, model), block_size=4, **options)  # type: ignore[arg-type]
    backend = llm.engine.runner.backend
    assert isinstance(backend, KernelBackend)
    steps = backend._step
    assert isinstance(steps, HostDecodeGraphs)
    return llm, steps


def start(llm: LLM, count: int) -> np.ndarray:
    """`count` sequences of 14 rows or more, with room for one more each: their slots."""
    forever = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for name in range(count):
        ids = [(7 * name + i) % 90 + 3 for i in range(14 + name % 5)]
        llm.engine.add_request(str(name), llm.processor.process({"prompt_token_ids": ids}), forever)
    while llm.engine.num_running < count:
        llm.engine.step()
    slots = np.array([sequence.slot for sequence in llm.engine._scheduler._running])
    llm.engine.runner.cache.grow(slots)
    return slots


@torch.inference_mode()
def both(steps: HostDecodeGraphs, ids: np.ndarray, slots: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits recorded, and kernel after kernel; each writes the same row of the cache."""
    recorded = steps.run(ids, slots).logits.clone()
    return recorded, steps._plain.run(ids, slots).logits


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_logits_of_every_size(model: ModelConfig, tmp_path: Path) -> None:
    llm, steps = load(tmp_path / "engine", model)
    slots = start(llm, 6)
    random = np.random.default_rng(torch.initial_seed())
    for _ in range(9):  # over the ends of blocks
        for count in (1, 2, 5, 6):
            chosen = random.permutation(slots)[:count]
            recorded, plain = both(steps, random.integers(3, 90, count), chosen)
            assert torch.equal(recorded, plain) and recorded.isfinite().all()
        llm.engine.runner.cache.grow(slots)
    most = 6 if model.quantize != "none" else cpu_choices().most_streamed_rows  # a library multiplies more dense ones
    assert sorted(steps._graphs) == [count for count in (1, 2, 5, 6) if count <= most]


def test_no_kernel_is_called_from_python_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, steps = load(tmp_path / "engine")
    slots = start(llm, 2)
    with torch.inference_mode():
        first = steps.run(np.array([5, 7]), slots).logits.clone()
        monkeypatch.setattr(steps._executor.decoder, "decode", None)
        assert torch.equal(steps.run(np.array([5, 7]), slots).logits, first)


@pytest.mark.parametrize("count", [MOST_RECORDED_ROWS, MOST_RECORDED_ROWS + 1])
def test_large_batches_are_not_recorded(count: int, tmp_path: Path) -> None:
    llm, steps = load(tmp_path / "engine", MODELS["int8"], max_num_seqs=MOST_RECORDED_ROWS + 1)
    recorded, plain = both(steps, np.arange(count) + 3, start(llm, count))
    assert torch.equal(recorded, plain)
    assert sorted(steps._graphs) == [count] * (count <= MOST_RECORDED_ROWS)


def test_token_ids_of_rows_that_are_not_used(tmp_path: Path) -> None:
    llm, steps = load(tmp_path / "engine")
    slots = start(llm, 2)
    with torch.inference_mode():
        found = steps.run(torch.tensor([5, -1]), slots).logits.clone()
        assert torch.equal(found[:1], steps.run(np.array([5, 0]), slots).logits[:1])


def test_windows_go_kernel_after_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch finds where windows begin: that is not recorded, and is not tried in every step."""
    llm, steps = load(tmp_path / "engine", WINDOWS)
    slots = start(llm, 3)
    tries: list[object] = []
    decode = steps._executor.decoder.decode
    monkeypatch.setattr(steps._executor.decoder, "decode", lambda *a: tries.append(0) or decode(*a))  # type: ignore[func-returns-value]
    for _ in range(3):
        recorded, plain = both(steps, np.array([5, 7, 9]), slots)
        assert torch.equal(recorded, plain)
        llm.engine.runner.cache.grow(slots)
    assert len(tries) == 1 + 3 * 2 and not steps._graphs


def test_what_a_library_multiplies_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "default_choices", lambda: replace(default_choices(), most_streamed_rows=1))
    llm, steps = load(tmp_path / "engine")
    slots = start(llm, 2)
    for _ in range(2):
        for count in (1, 2):
            recorded, plain = both(steps, np.arange(count) + 5, slots[:count])
            assert torch.equal(recorded, plain)
    assert sorted(steps._graphs) == [1] and steps._not_recordable == {2}


def test_a_closed_engine_is_freed(tmp_path: Path) -> None:
    """At once, with weights and KV blocks: the next engine may need the memory."""
    llm, steps = load(tmp_path / "engine")
    both(steps, np.array([5]), start(llm, 1))
    assert list(steps._graphs) == [1]
    pool = weakref.ref(steps._executor.pool)
    gc.collect()
    gc.disable()
    try:
        del llm, steps
        assert pool() is None
    finally:
        gc.enable()


def test_results_of_all_sizes_share_memory(tmp_path: Path) -> None:
    llm, steps = load(tmp_path / "engine", MODELS["int8"])
    slots, sizes = start(llm, 8), []
    for count in (8, 7, 3, 1):
        both(steps, np.arange(count) + 5, slots[:count])
        sizes.append(steps._memory.num_bytes)
    assert len(set(sizes)) == 1, "the largest came first"


def test_outside_of_inference_mode(tmp_path: Path) -> None:
    llm, steps = load(tmp_path / "engine")
    slots = start(llm, 1)
    with torch.inference_mode():
        first = steps.run(np.array([5]), slots).logits.clone()
    assert torch.equal(steps.run(np.array([5]), slots).logits, first)


@pytest.mark.parametrize("fails", ["the recording", "a replay"])
def test_a_step_that_fails_leaves_the_next_ones_alone(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, steps = load(tmp_path / "engine")
    slots = start(llm, 2)
    with torch.inference_mode():
        wanted = steps._plain.run(np.array([5, 7]), slots).logits
    if fails == "a replay":
        both(steps, np.array([5, 7]), slots)
    cache = llm.engine.runner.cache
    tables = type(cache).block_tables
    monkeypatch.setattr(type(cache), "block_tables", lambda *a, **k: np.full_like(tables(*a, **k), 10**6))
    with torch.inference_mode(), pytest.raises(KernelArgumentError, match="block_table"):
        steps.run(np.array([5, 7]), slots)
    monkeypatch.undo()
    assert torch.equal(both(steps, np.array([5, 7]), slots)[0], wanted)


@pytest.mark.parametrize("options", [{}, {"kv_cache_bytes": kv_bytes(70, 4)}, {"max_chunk_tokens": 7}])
def test_whole_answers(options: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that start and end at different steps, or are preempted, and prefills in parts between the steps."""
    random = np.random.default_rng(torch.initial_seed())
    prompts = [random_prompt(random, (5, 5) if i % 2 else None) for i in range(7)]
    params = [
        SamplingParams(temperature=0.7, seed=i, max_tokens=3 + 4 * (i % 4), logprobs=2, ignore_eos=True)
        for i in range(7)
    ]

    def answers() -> list[list[object]]:
        llm, steps = load(tmp_path / "engine", max_num_seqs=4, **options)
        outputs: list[RequestOutput] = llm.generate(prompts, params, use_tqdm=False)
        ran.append(len(steps._graphs))
        return [[output.outputs[0].token_ids, output.outputs[0].logprobs] for output in outputs]

    ran: list[int] = []
    recorded = answers()
    monkeypatch.setattr(HostDecodeGraphs, "run", lambda steps, *given: plain_run(steps, *given))
    (tmp_path / "engine").rename(tmp_path / "first")
    assert answers() == recorded
    assert ran[0] >= 2 and ran[1] == 0


def plain_run(steps: HostDecodeGraphs, ids: np.ndarray, slots: np.ndarray) -> Decoded:
    plain: PlainDecodeStep = steps._plain
    return plain.run(ids, slots)
