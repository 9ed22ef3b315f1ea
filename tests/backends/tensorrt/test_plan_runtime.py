"""The runtime around plans: slots, padding and limits, and the errors of engines and requests."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.backends.tensorrt import cuda
from dpn_rt.backends.tensorrt.cuda import check_host
from dpn_rt.backends.tensorrt.library import load_library
from dpn_rt.backends.tensorrt.padding import Padding, neighbours
from dpn_rt.backends.tensorrt.slots import SlotCache, SlotMemory
from dpn_rt.backends.tensorrt.tensors import StagePlan
from dpn_rt.device.host import HostDevice
from dpn_rt.errors import BatchError, CapacityError, ConfigError, EngineError, PlanError, RequestError, StepError
from dpn_rt.format.plans import PlanConfig, PlanLimits
from dpn_rt.reference import EagerDpn
from tests.backends.tensorrt.engines import (
    EvaluatedPlan,
    EvaluatingReader,
    evaluated_llm,
    limits_of,
    logprob_error,
    write_plan_engine,
)
from tests.engine.models import MODEL, random_prompt, random_weights, with_decoder
from tests.skips import GPU_PRESENT, NO_TENSORRT

TEXT = dataclasses.replace(MODEL, vision=None, projector=None)
GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
LIMITS = limits_of(TEXT, rows=96, max_batch=3, max_prefill_batch=2)

needs_networks = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("tensorrt_rtx_bindings"),
    reason=NO_TENSORRT,
)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_plan_engine(tmp_path / "engine", TEXT, dict(random_weights(TEXT)), LIMITS)


# Padding and slots


def test_padding_takes_sequences_in_the_order_asked_for_and_puts_them_back() -> None:
    lengths = np.array([3, 1, 7, 2], dtype=np.int32)
    cu_seqlens = np.array([0, *np.cumsum(lengths)], dtype=np.int32)
    rows = torch.randn(13, 5)
    parts = rows.split(lengths.tolist())
    for chosen, longest in (([2, 0], 7), ([0, 1, 2, 3], 7), ([3], 2), ([1, 3], 2)):
        padding = Padding.of(cu_seqlens, np.array(chosen), HostDevice())
        padded = padding.pad(rows)
        assert padded.shape == (len(chosen), longest, 5)
        for found, index in zip(padded, chosen, strict=True):
            assert torch.equal(found[: lengths[index]], parts[index])
            assert not found[lengths[index] :].any()
        out = torch.zeros_like(rows)
        padding.unpad(padded + 1, out)
        for index, (found, part) in enumerate(zip(out.split(lengths.tolist()), parts, strict=True)):
            assert torch.equal(found, part + 1 if index in chosen else torch.zeros_like(part))


def test_neighbours_are_slots_in_a_row() -> None:
    slots = np.array([7, 2, 0, 1, 5, 3], dtype=np.intp)
    groups = [slots[group].tolist() for group in neighbours(slots, 3)]
    assert groups == [[0, 1, 2], [3], [5], [7]]
    assert [slots[group].tolist() for group in neighbours(slots[:1], 4)] == [[7]]


def test_slots_are_given_out_lowest_first_and_counted() -> None:
    limits = PlanLimits(3, 2, (8, 4))
    cache = SlotCache(limits, SlotMemory({"k": torch.zeros(3, 1, 8, 2)}))
    assert [cache.open_slot() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(CapacityError, match="all 3 sequence slots"):
        cache.open_slot()
    cache.fill_stage(0, np.array([1]), np.array([5], dtype=np.int32))
    cache.close_slot(2)
    cache.close_slot(1)
    assert cache.num_free_blocks == 2
    assert cache.open_slot() == 1
    assert cache.lengths(np.array([1])).tolist() == [[0, 0]]
    with pytest.raises(CapacityError, match="5 rows in stage 1, the plans were built for 4"):
        cache.fill_stage(1, np.array([1]), np.array([5], dtype=np.int32))


def test_slots_know_positions_apart_from_rows() -> None:
    cache = SlotCache(PlanLimits(3, 2, (8, 4)), SlotMemory({"k": torch.zeros(3, 1, 8, 2)}))
    slots = np.array([cache.open_slot(), cache.open_slot()])
    cache.fill_stage(0, slots, np.array([5, 2], dtype=np.int32), np.array([7, 40], dtype=np.int32))
    cache.fill_stage(1, slots, np.array([3, 1], dtype=np.int32))
    cache.grow(slots)
    assert cache.lengths(slots).tolist() == [[6, 4], [3, 2]]
    assert cache.next_positions(slots).tolist() == [[8, 4], [41, 2]]
    cache.close_slot(0)
    assert cache.next_positions(slots).tolist() == [[0, 0], [41, 2]]


def test_a_device_that_is_too_small() -> None:
    huge = PlanLimits(1 << 40, 1, (96,) * 4)
    with pytest.raises(CapacityError, match=r"cpu has no room for [\d,]+ bytes of KV caches.*lower --max-batch"):
        SlotMemory.allocate([StagePlan(TEXT, huge, 0, "prefill")], torch.float32, torch.device("cpu"))


@needs_networks
def test_sequences_that_end_at_different_times_leave_slots_to_others(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free slots between running ones, new sequences in them, images and text: all get the eager model's answers."""
    eager = EagerDpn.from_weights(TEXT, random_weights(TEXT))
    random = np.random.default_rng(torch.initial_seed())
    grids = [(5, 5), None, (4, 6), (2, 2), None, (5, 4), (6, 6)]
    prompts = [random_prompt(random, grid) for grid in grids]
    params = [dataclasses.replace(GREEDY, max_tokens=count) for count in (9, 1, 5, 2, 7, 3, 4)]
    llm = evaluated_llm(engine, monkeypatch, max_chunk_tokens=8, reuse_bytes=1 << 20)  # settings of the server
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, each, output in zip(prompts, params, outputs, strict=True):
        image = prompt.get("multi_modal_data", {})
        wanted = eager.generate(
            prompt["prompt_token_ids"],
            image_embeds=image.get("image_embeds"),
            image_grid=image.get("image_grid"),
            max_new_tokens=each.max_tokens,
            ignore_eos=True,
        )
        assert list(output.outputs[0].token_ids) == list(wanted.token_ids)
        assert list(output.pyramid.kv_lengths) == list(wanted.trace.kv_lengths)
    assert llm.engine.runner.cache.num_free_slots == LIMITS.max_batch
    assert llm.engine.max_num_seqs == LIMITS.max_batch


@needs_networks
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.3), ("float16", 0.03)])
def test_tensors_are_in_the_engines_dtype(
    dtype: str, bound: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans round rows, caches and logits to their dtype. Boundaries run on the CPU here, which takes no float16."""
    model = dataclasses.replace(TEXT, dtype=dtype)  # type: ignore[arg-type]
    weights = dict(random_weights(model))
    eager = EagerDpn.from_weights(TEXT, ((name, weight.float()) for name, weight in weights.items()))
    prompt = random_prompt(np.random.default_rng(torch.initial_seed()), (6, 6)) | {"route": [1, 0, 2]}
    path = write_plan_engine(tmp_path / "engine", model, weights, LIMITS)
    llm = evaluated_llm(path, monkeypatch)
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, ignore_eos=True)
    output = llm.generate(prompt, params, use_tqdm=False)[0]
    image = prompt["multi_modal_data"]
    wanted = eager.generate(
        prompt["prompt_token_ids"],
        image_embeds=image["image_embeds"],
        image_grid=image["image_grid"],
        route=prompt["route"],
        max_new_tokens=1,
        ignore_eos=True,
    )
    assert list(output.pyramid.experts) == [1, 0, 2]
    assert logprob_error(output, torch.log_softmax(wanted.logits.double(), -1)) < bound


# Requests


@needs_networks
def test_limits_are_kept_at_admission(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = evaluated_llm(engine, monkeypatch)
    long, short = {"prompt_token_ids": [5] * 200}, {"prompt_token_ids": [5] * 10}
    with pytest.raises(BatchError) as info:
        llm.generate([long, short], GREEDY, use_tqdm=False)
    assert list(info.value.errors) == [0]
    assert isinstance(info.value.errors[0], RequestError)
    assert "expected at most 95" in str(info.value.errors[0])
    assert len(info.value.outputs[1].outputs[0].token_ids) == 5  # type: ignore[attr-defined]


@needs_networks
def test_limits_of_a_later_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request with a forced route that pools fits, where the same request without one might not."""
    limits = PlanLimits(2, 2, (96, 60, 60, 60))
    path = write_plan_engine(tmp_path / "engine", TEXT, dict(random_weights(TEXT)), limits)
    llm = evaluated_llm(path, monkeypatch)
    prompt = random_prompt(np.random.default_rng(torch.initial_seed()), (8, 8))
    with pytest.raises(CapacityError, match=r"the plans were built for \(96, 60, 60, 60\).*--max-rows"):
        llm.generate(prompt, GREEDY, use_tqdm=False)
    output = llm.generate(prompt | {"route": [2, 0, 0]}, GREEDY, use_tqdm=False)[0]
    assert output.pyramid.visual_tokens == [64, 16, 16, 16]


@needs_networks
def test_a_plan_that_fails_ends_its_requests_with_what_the_library_said(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = evaluated_llm(engine, monkeypatch)
    run = EvaluatedPlan.run

    def fail(self: EvaluatedPlan, *arguments: Any) -> None:
        raise PlanError("stage0.prefill.plan failed: error: CUDA out of memory")

    monkeypatch.setattr(EvaluatedPlan, "run", fail)
    with pytest.raises(StepError, match="CUDA out of memory"):
        llm.generate({"prompt_token_ids": [5, 6]}, GREEDY, use_tqdm=False)
    monkeypatch.setattr(EvaluatedPlan, "run", run)
    assert llm.generate({"prompt_token_ids": [5, 6]}, GREEDY, use_tqdm=False)


# Engines and machines


@needs_networks
def test_plans_of_another_model(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = with_decoder(TEXT, intermediate_size=80, qkv_bias=True)

    def opened(self: EvaluatingReader, data: bytes, plan: StagePlan) -> EvaluatedPlan:
        return EvaluatedPlan(dataclasses.replace(plan, model=other))

    monkeypatch.setattr(EvaluatingReader, "open", opened)
    with pytest.raises(PlanError) as info:
        evaluated_llm(engine, monkeypatch)
    message = str(info.value)
    assert message.startswith("plans/stage0.prefill.plan does not match the engine's model: ")
    assert "input layers.0.qkv.bias is unexpected" in message
    assert "input layers.1.down.weight: expected torch.float32 (64, 96), got (torch.float32, (64, 80))" in message


def test_a_plan_is_missing(engine: Path) -> None:
    (engine / "plans/stage2.decode.plan").unlink()
    with pytest.raises(EngineError, match=r"stage2\.decode\.plan: missing, but engine\.json lists it"):
        LLM(engine)


def test_a_plan_is_not_listed(engine: Path) -> None:
    edit_manifest(engine, lambda manifest: manifest["files"].pop("plans/stage2.decode.plan"))
    with pytest.raises(EngineError, match=r"plans/stage2\.decode\.plan missing: every stage needs a plan"):
        LLM(engine)


def test_a_plan_was_changed(engine: Path) -> None:
    (engine / "plans/stage1.decode.plan").write_bytes(b"stage 1 decodE")
    with pytest.raises(EngineError, match="expected sha256"):
        LLM(engine)


def test_limits_do_not_fit_the_model(engine: Path) -> None:
    edit_manifest(engine, lambda manifest: manifest["plans"]["limits"].update(stage_rows=[96]))
    with pytest.raises(EngineError, match=r"rows for 1 stages \[96\]: expected 4"):
        LLM(engine)


@pytest.mark.parametrize(
    ("version", "capability", "message"),
    [
        ("1.7.2", "8.6", "built by tensorrt_rtx_bindings 1.7.1, 1.7.2 is installed"),
        ("1.7.1", None, "compute capability 8.6, 8.9, there is no GPU"),
        ("1.7.1", "9.0", "8.6, 8.9, this one has 9.0: build the engine again with --sm 90"),
    ],
)
def test_plans_for_another_machine(version: str, capability: str | None, message: str) -> None:
    plans = PlanConfig("rtx", "1.7.1", ("8.6", "8.9"), LIMITS)
    check_host(plans, "1.7.1", "8.9")
    with pytest.raises(PlanError, match=message):
        check_host(plans, version, capability)


@needs_networks
@pytest.mark.skipif(torch.cuda.is_available(), reason=GPU_PRESENT)
def test_without_a_gpu_the_error_says_so(engine: Path) -> None:
    version = load_library("rtx").__version__
    edit_manifest(engine, lambda manifest: manifest["plans"].update(version=version))
    with pytest.raises(PlanError, match=r"there is no GPU that torch can use.*--backend native"):
        LLM(engine)


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(PlanError, match="tensorrt cannot be imported.*10.15 or newer"):
        load_library("enterprise")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "expected 'auto' or 'cuda'"),
        ({"kv_cache_bytes": 1 << 20}, r"kv_cache_bytes=1048576: expected none.* 3 slots of \[96, 96, 96, 96\] rows"),
    ],
)
def test_options_without_a_use(engine: Path, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(engine, **options)


def edit_manifest(engine: Path, change: Any) -> None:
    file = engine / "engine.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


# The plan on a GPU, with fakes of the library's objects


class PlayedContext:
    """A fake execution context that records its calls."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return self.fails != "shape"

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return self.fails != "address"

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77
        return self.fails != "execute"


class PlayedLog:
    def explain(self, what: str) -> PlanError:
        return PlanError(f"{what}: error: said the library")


def played_plan(context: PlayedContext, monkeypatch: pytest.MonkeyPatch) -> cuda.CudaPlan:
    stream = type("Stream", (), {"cuda_stream": 77})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    plan = cuda.CudaPlan.__new__(cuda.CudaPlan)
    plan._log, plan._name, plan._context = PlayedLog(), "stage0.decode.plan", context  # type: ignore[assignment]
    return plan


def aligned(*shape: int) -> torch.Tensor:
    whole = torch.zeros(torch.Size(shape).numel() + 64)
    start = -whole.data_ptr() % 256 // 4
    return whole[start : start + torch.Size(shape).numel()].view(shape)


def test_a_plan_is_given_shapes_addresses_and_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    context = PlayedContext()
    hidden, cache, out = aligned(2, 1, 8), aligned(2, 4, 8), aligned(2, 1, 8)
    played_plan(context, monkeypatch).run({"hidden": hidden, "c": cache}, {"hidden_out": out, "c_out": cache})
    assert context.shapes == {"hidden": (2, 1, 8), "c": (2, 4, 8)}
    wanted = {"hidden": hidden, "c": cache, "hidden_out": out, "c_out": cache}
    assert context.addresses == {name: tensor.data_ptr() for name, tensor in wanted.items()}


@pytest.mark.parametrize("fails", ["shape", "address", "execute"])
def test_a_refusal_ends_with_what_the_library_said(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match=r"stage0\.decode\.plan.*error: said the library"):
        played_plan(PlayedContext(fails), monkeypatch).run({"hidden": aligned(2, 1, 8)}, {})


def test_addresses_must_be_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="expected contiguous memory at a multiple of 256 bytes"):
        played_plan(PlayedContext(), monkeypatch).run({"hidden": aligned(3, 8)[1:]}, {})
