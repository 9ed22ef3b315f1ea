"""A request that cannot be served is refused with its name, and the others of its batch are not affected."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import LLM, DpnError, SamplingParams
from dpn_rt.errors import BatchError, CapacityError, ConfigError, EngineError, RequestError, StepError
from dpn_rt.format.engine_dir import EngineSource, write_engine
from dpn_rt.model.reduction.pooling_config import BoundaryConfig, PoolingConfig
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.model.vision.visual_input import VisualInput
from tests.engine.models import (
    KERNELS,
    MODEL,
    ROUTER_ID,
    VISION,
    random_prompt,
    random_weights,
    with_decoder,
    write_random_engine,
)

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_engine(tmp_path_factory.mktemp("engines") / "adaptive")


@pytest.fixture(scope="module")
def llm(engine_dir: Path) -> LLM:
    return LLM(engine_dir)


def with_image(ids: list[int], embeds: torch.Tensor | None = None, **extra: Any) -> dict[str, Any]:
    media = {"image_embeds": torch.zeros(16, 64) if embeds is None else embeds}
    return {"prompt_token_ids": ids, "multi_modal_data": media, **extra}


BAD_PROMPTS: list[tuple[Any, str]] = [
    ({"prompt_token_ids": []}, "empty"),
    ({"prompt_token_ids": [3, 100]}, r"prompt_token_ids\[1\]=100: expected 0 to 99"),
    ({"prompt_token_ids": [3, -1]}, r"prompt_token_ids\[1\]=-1"),
    ({"prompt_token_ids": [3, -200]}, "no image was given"),
    ({"prompt_token_ids": [3] * 600}, "600 rows"),
    ("What is this?", "no tokenizer"),
    (with_image([3, ROUTER_ID]), "no placeholder"),
    (with_image([*[-200] * 17, ROUTER_ID]), "17 image placeholders: expected at most 16 per prompt"),
    (with_image([3, -200, 4]), "<ROUTER>"),
    (with_image([ROUTER_ID, -200, 4]), "before the image"),
    (with_image([-200, ROUTER_ID], torch.zeros(16, 65)), "image_embeds"),
    (with_image([-200, ROUTER_ID], torch.zeros(17, 64)), "no square grid"),
    (with_image([-200, ROUTER_ID], torch.full((16, 64), float("nan"))), "NaN"),
    (with_image([-200, ROUTER_ID], torch.zeros(16, 64).to_sparse()), "image_embeds: expected a dense tensor"),
    (with_image([-200, ROUTER_ID], torch.empty(16, 64, device="meta")), "image_embeds: expected a dense tensor"),
    (with_image([-200, ROUTER_ID], image_grid=(3, 5)), "image_grid"),
    (with_image([-200, ROUTER_ID], route=[0, 1]), "route"),
    (with_image([-200, ROUTER_ID], route=[0, 1, 3]), r"route\[2\]=3"),
    (with_image([-200, ROUTER_ID], router_bias="fast"), "router_bias='fast': expected a number"),
    (with_image([-200, ROUTER_ID], router_bias=float("nan")), "router_bias=nan"),
    (with_image([-200, ROUTER_ID], router_bias=1001), "router_bias=1001"),
    (with_image([-200, ROUTER_ID], router_bias=-(10**400)), "router_bias=-1000"),
    ({"prompt_token_ids": [3], "unknown": 1}, "unknown"),
    (7, "expected a string or a dict"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_bad_prompt_alone(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate([prompt] if isinstance(prompt, int) else prompt, PARAMS, use_tqdm=False)[0]
    assert llm.engine.num_unfinished == 0


def test_bad_prompts_do_not_harm_the_batch(llm: LLM) -> None:
    generator = np.random.default_rng(torch.initial_seed())
    good = [random_prompt(generator, (4, 5)), random_prompt(generator, None)]
    expected = [llm.generate(prompt, PARAMS, use_tqdm=False)[0].outputs[0].token_ids for prompt in good]
    mixed = [good[0], *(prompt for prompt, _ in BAD_PROMPTS), good[1]]
    with pytest.raises(BatchError, match=f"{len(BAD_PROMPTS)} of {len(mixed)} prompts failed") as caught:
        llm.generate(mixed, PARAMS, use_tqdm=False)
    assert sorted(caught.value.errors) == list(range(1, len(mixed) - 1))
    outputs = [caught.value.outputs[0], caught.value.outputs[-1]]
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert llm.engine.runner.cache.num_free_blocks == llm.engine.runner.cache.num_blocks


def test_parameters_that_do_not_fit_the_model(llm: LLM) -> None:
    prompt = {"prompt_token_ids": [3, 4]}
    for params, message in [
        (SamplingParams(stop_token_ids=[100]), "stop_token_ids has 100"),
        (SamplingParams(logprobs=101), "logprobs=101"),
        (SamplingParams(stop="x"), "no tokenizer"),
    ]:
        with pytest.raises(RequestError, match=message):
            llm.generate(prompt, params, use_tqdm=False)


@pytest.mark.parametrize("params", [{"max_tokens": 3}, [None], ["x"], [PARAMS, PARAMS], "greedy", 0])
def test_parameters_of_another_type(llm: LLM, params: Any) -> None:
    with pytest.raises(RequestError, match="sampling.param"):
        llm.generate([{"prompt_token_ids": [3]}], params, use_tqdm=False)
    with pytest.raises(RequestError, match="sampling.param"):
        next(llm.stream({"prompt_token_ids": [3]}, params))
    assert llm.engine.num_unfinished == 0


@pytest.mark.parametrize("prompts", [None, 7, b"text"])
def test_prompts_of_another_type(llm: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError, match="expected a prompt or a list"):
        llm.generate(prompts, PARAMS, use_tqdm=False)


@pytest.mark.parametrize("messages", [None, [], "text", {"role": "user", "content": "text"}])
def test_messages_of_another_type(llm: LLM, messages: Any) -> None:
    with pytest.raises(RequestError, match="messages: expected a list"):
        llm.chat(messages, PARAMS)


@pytest.mark.parametrize(
    "reduction",
    [
        NoReduction(),
        PoolingConfig((BoundaryConfig(1, ((2, 2),)), BoundaryConfig(4, ((1, 2),))), pooling_type="static"),
        PoolingConfig((BoundaryConfig(1, KERNELS), BoundaryConfig(4, KERNELS)), pooling_type="random"),
    ],
    ids=["dense", "static", "random"],
)
def test_steering_of_a_model_without_routers(tmp_path: Path, reduction: Any) -> None:
    """Zero and none change nothing, and are accepted."""
    llm = LLM(write_random_engine(tmp_path / "engine", dataclasses.replace(MODEL, reduction=reduction)))
    assert llm.model.reduction == reduction and llm.engine.num_unfinished == 0
    prompt = with_image([3, -200, 4])
    params = dataclasses.replace(PARAMS, seed=1)
    outputs = [llm.generate({**prompt, **extra}, params, use_tqdm=False)[0] for extra in ({}, {"router_bias": 0})]
    outputs.append(llm.generate({**prompt, "router_bias": None}, params, use_tqdm=False)[0])
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    for bias in (0.5, -8):
        with pytest.raises(RequestError, match=f"router_bias={bias}: this model has no routers, expected 0 or none"):
            llm.generate({**prompt, "router_bias": bias}, params, use_tqdm=False)


def test_pool_too_small_for_one_request(engine_dir: Path) -> None:
    llm = LLM(engine_dir, kv_cache_bytes=200_000)
    prompt = random_prompt(np.random.default_rng(torch.initial_seed()), (16, 16))
    with pytest.raises(CapacityError, match=r"raise kv_cache_bytes to at least \d+") as caught:
        llm.generate(prompt, PARAMS, use_tqdm=False)
    needed = int(str(caught.value).split("at least ")[1].split(",")[0])
    enough = LLM(engine_dir, kv_cache_bytes=needed)
    assert len(enough.generate(prompt, PARAMS, use_tqdm=False)[0].outputs[0].token_ids) == 6


def test_bad_limits(engine_dir: Path) -> None:
    for arguments, message in [
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"block_size": -1}, "block_size=-1"),
        ({"max_model_len": 10_000}, "max_model_len=10000: expected at most 512"),
        ({"device": "tpu"}, "device='tpu'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            LLM(engine_dir, **arguments)
    with pytest.raises(CapacityError, match="kv_cache_bytes=10"):
        LLM(engine_dir, kv_cache_bytes=10)
    with pytest.raises(CapacityError, match="lower kv_cache_bytes"):
        LLM(engine_dir, kv_cache_bytes=10**18)
    for path in (None, 5, b"engine"):
        with pytest.raises(EngineError, match="expected a path"):
            LLM(path)  # type: ignore[arg-type]


def test_answer_ends_at_the_model_length(llm: LLM) -> None:
    output = llm.generate(
        {"prompt_token_ids": [3] * 500}, SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False
    )[0]
    assert len(output.outputs[0].token_ids) == 12
    assert output.outputs[0].finish_reason == "length"


def test_overflowing_request_fails_alone(tmp_path: Path) -> None:
    """An engine with a token whose embedding is not finite, as after a conversion that overflowed."""
    weights = dict(random_weights(MODEL))
    weights["embed_tokens.weight"][50] = torch.inf
    weights["lm_head.weight"][50] = 0  # never the most probable token: the other requests do not generate it
    write_engine(tmp_path / "engine", MODEL, EngineSource("0" * 64, "original"), weights.items(), {}, force=False)
    llm = LLM(tmp_path / "engine")
    prompt = {"prompt_token_ids": [3, 4, 5]}
    expected = llm.generate(prompt, PARAMS, use_tqdm=False)[0].outputs[0].token_ids
    huge = {"prompt_token_ids": [3, 50, 5]}
    with pytest.raises(BatchError) as caught:
        llm.generate([prompt, huge, prompt], PARAMS, use_tqdm=False)
    assert isinstance(caught.value.errors[1], StepError)
    assert [caught.value.outputs[i].outputs[0].token_ids for i in (0, 2)] == [expected, expected]


def test_kernel_that_does_not_fit_fails_alone(llm: LLM) -> None:
    generator = np.random.default_rng(torch.initial_seed())
    narrow, good = random_prompt(generator, (32, 1)), random_prompt(generator, (6, 6))
    expected = llm.generate(good, PARAMS, use_tqdm=False)[0].outputs[0].token_ids
    mild = llm.generate({**narrow, "route": [0, 0, 0]}, PARAMS, use_tqdm=False)[0]
    assert mild.pyramid.experts == [0, 0, 0]  # 1x1 fits and scales
    with pytest.raises(
        BatchError, match=r"kernel \(2, 2\) of expert 2 behind layer 2 does not fit the grid \(32, 1\)"
    ) as caught:
        llm.generate([good, {**narrow, "route": [0, 2, 0]}, good], PARAMS, use_tqdm=False)
    assert [caught.value.outputs[i].outputs[0].token_ids for i in (0, 2)] == [expected, expected]


def test_float16_engine_on_the_cpu(tmp_path: Path) -> None:
    import dataclasses

    write_random_engine(tmp_path / "engine", dataclasses.replace(MODEL, dtype="float16"))
    with pytest.raises(ConfigError, match="dtype is float16, expected float32 or bfloat16"):
        LLM(tmp_path / "engine")


def test_boundary_free_model(tmp_path: Path) -> None:
    model = dataclasses.replace(with_decoder(tie_word_embeddings=True), reduction=NoReduction())
    llm = LLM(write_random_engine(tmp_path / "engine", model))
    output = llm.generate(with_image([3, -200, 4]), PARAMS, use_tqdm=False)[0]
    assert output.pyramid.experts == []
    assert output.pyramid.visual_tokens == [16]


def test_a_class_row_counts_as_a_visual_token(tmp_path: Path) -> None:
    vision = dataclasses.replace(VISION, select_feature="cls_patch")
    model = dataclasses.replace(MODEL, reduction=NoReduction(), vision=vision)
    llm = LLM(write_random_engine(tmp_path / "engine", model))
    pixels = torch.randn(3, vision.image_size, vision.image_size)
    image = VisualInput.of_views((pixels,), vision.grid, vision.num_visual_tokens)
    asked = {"prompt_token_ids": [5, -200, 6], "multi_modal_data": {"image": image}}
    output = llm.generate(asked, PARAMS, use_tqdm=False)[0]
    assert output.pyramid.visual_tokens == [17] and output.pyramid.kv_lengths == [19]


def test_more_sequences_than_memory_has_room_for(tmp_path: Path) -> None:
    with pytest.raises(
        CapacityError, match="tables take .* are free: lower max_model_len, or max_num_seqs=1099511627776"
    ):
        LLM(write_random_engine(tmp_path / "engine"), max_num_seqs=2**40)


def test_interrupt_leaves_a_working_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [random_prompt(np.random.default_rng(torch.initial_seed()), (6, 6)) for _ in range(4)]
    steps = 0
    decode = llm.engine.runner.decode

    def interrupted(batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGINT)  # arrives inside the step
        return decode(batch)

    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine.runner, "decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(prompts, PARAMS, use_tqdm=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert llm.engine.num_unfinished == 0
    assert llm.engine.runner.cache.num_free_blocks == llm.engine.runner.cache.num_blocks
    assert len(llm.generate(prompts, PARAMS, use_tqdm=False)) == 4


def test_errors_are_one_tree() -> None:
    import dpn_rt.errors

    for name in vars(dpn_rt.errors):
        kind = getattr(dpn_rt.errors, name)
        if isinstance(kind, type) and issubclass(kind, Exception):
            assert issubclass(kind, DpnError)
