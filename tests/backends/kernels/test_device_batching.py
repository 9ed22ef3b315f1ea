"""The runtime for GPUs gives a request in any batch the same result as the CPU's runtime gives it alone."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.errors import BatchError
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.outputs import RequestOutput
from dpn_rt.prompts.processor import MAX_ROUTER_BIAS
from tests.engine.answers import all_logprobs, assert_ids_are, assert_pool_is_full, assert_tokens_are
from tests.engine.models import (
    MODEL,
    kv_bytes,
    random_images,
    random_prompt,
    with_pyramid,
    write_random_engine,
)
from tests.places import Place

# Every route fits these grids. A grid of 24 x 2 would not do: it could become 24 x 1, which no 1 x 2 kernel fits.
GRIDS = [(12, 12), (4, 4), None, (5, 5), (8, 8), (3, 7), (10, 6), (9, 2), None, (16, 16)]
ROUTES = [[1, 0, 2], None, None, [2, 1, 1], [2, 0, 1], None, [None, 2, None], None, None, [2, 2, 2]]
FORCED = [0, 1, 1]
"""Experts on a GPU where a route leaves the choice to the router."""
GREEDY = SamplingParams(temperature=0, max_tokens=14, logprobs=-1, ignore_eos=True)
PLAIN = SamplingParams(temperature=0, max_tokens=14, ignore_eos=True)
"""Sampling needs only the best ids, which the step itself computes."""

Prompt = dict[str, Any]


@pytest.fixture
def engine_dir(place: Place, tmp_path: Path) -> Path:
    return write_random_engine(tmp_path / "engine", dataclasses.replace(MODEL, dtype=place.dtype))


@pytest.fixture
def prompts(place: Place) -> list[Prompt]:
    generator = np.random.default_rng(torch.initial_seed())
    made = [random_prompt(generator, grid) for grid in GRIDS]
    for prompt, grid, route in zip(made, GRIDS, ROUTES, strict=True):
        if grid is None:
            continue
        if route is not None:
            prompt["route"] = route
        if place.device is None:  # in bfloat16 a router with two nearly equal probabilities may choose the other expert
            given = route or [None] * len(FORCED)
            prompt["route"] = [own if expert is None else expert for expert, own in zip(given, FORCED, strict=True)]
    return made


def alone(engine_dir: Path, prompts: list[Prompt], params: SamplingParams = GREEDY) -> list[RequestOutput]:
    llm = LLM(engine_dir, device="cpu")
    return [llm.generate(prompt, params, use_tqdm=False)[0] for prompt in prompts]


def assert_near(actual: RequestOutput, expected: RequestOutput, place: Place) -> None:
    """Compares all tokens on the host. On a GPU only the first token's log-probabilities: later choices may differ."""
    assert actual.error is None
    assert actual.pyramid.experts == expected.pyramid.experts
    assert actual.pyramid.kv_lengths == expected.pyramid.kv_lengths
    if place.device is not None:
        assert_tokens_are(actual, expected.outputs[0].token_ids, all_logprobs(expected))
        return
    torch.testing.assert_close(all_logprobs(actual)[:1], all_logprobs(expected)[:1], atol=place.tolerance, rtol=0)


@pytest.mark.parametrize("size", [1, 3, 6, 9])
def test_batch_equals_alone(place: Place, engine_dir: Path, prompts: list[Prompt], size: int) -> None:
    llm = place.load(engine_dir, max_num_seqs=size)
    order = random.sample(range(len(prompts)), len(prompts))
    outputs = llm.generate([prompts[i] for i in order], GREEDY, use_tqdm=False)
    for output, expected in zip(outputs, alone(engine_dir, [prompts[i] for i in order]), strict=True):
        assert_near(output, expected, place)
    for plain, output in zip(llm.generate([prompts[i] for i in order], PLAIN, use_tqdm=False), outputs, strict=True):
        assert_ids_are(plain.outputs[0].token_ids, output.outputs[0].token_ids, all_logprobs(output))
    assert_pool_is_full(llm)


def test_preempted_equals_alone(place: Place, engine_dir: Path, prompts: list[Prompt]) -> None:
    num_bytes = kv_bytes(256 + 25 + 13, 4, LLM(engine_dir, device="cpu").model)
    llm = place.load(engine_dir, kv_cache_bytes=num_bytes, block_size=4, max_num_seqs=9)
    # Nine times 32 rows fill the pool, and every sequence needs a new block for its next row.
    together = [{"prompt_token_ids": [*range(start, start + 32)]} for start in range(3, 12)] + prompts
    outputs = llm.generate(together, GREEDY, use_tqdm=False)
    for output, expected in zip(outputs, alone(engine_dir, together), strict=True):
        assert_near(output, expected, place)
    assert llm.engine.num_preemptions > 0
    assert_pool_is_full(llm)


@pytest.mark.parametrize("chunk", [5, 40])
def test_chunks_and_kept_beginnings(place: Place, engine_dir: Path, prompts: list[Prompt], chunk: int) -> None:
    llm = place.load(engine_dir, max_chunk_tokens=chunk, reuse_bytes=2**24, block_size=4)
    for _ in range(2):
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        for output, expected in zip(outputs, alone(engine_dir, prompts), strict=True):
            assert_near(output, expected, place)
    prefix = llm.engine.runner.prefix_cache
    assert prefix is not None and prefix.statistics.image_hits > 0 and prefix.statistics.hit_rows > 0
    assert_pool_is_full(llm)


def test_one_leaves_in_the_middle_of_a_prefill(place: Place, engine_dir: Path, prompts: list[Prompt]) -> None:
    expected = alone(engine_dir, prompts[:4])
    for steps in (3, 9, 15):
        llm = place.load(engine_dir, max_chunk_tokens=13)
        llm.engine.add_request("long", llm.processor.process({"prompt_token_ids": [1, 2, 3]}), GREEDY)
        llm.engine.step()
        for i in range(4):
            llm.engine.add_request(str(i), llm.processor.process(prompts[i]), GREEDY)
        for _ in range(steps):
            llm.engine.step()
        llm.engine.abort("1")
        outputs = {}
        while llm.engine.num_unfinished:
            outputs.update({output.request_id: output for output in llm.engine.step().finished})
        for i in (0, 2, 3):
            assert_near(outputs[str(i)], expected[i], place)
        assert_pool_is_full(llm)


def test_forked_completions(place: Place, engine_dir: Path, prompts: list[Prompt]) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=10, ignore_eos=True, logprobs=0, top_p=0.95)
    llm = place.load(engine_dir, block_size=4, max_num_seqs=9)
    outputs = llm.generate(prompts[:3], params, use_tqdm=False)
    assert_pool_is_full(llm)
    for output, expected in zip(outputs, alone(engine_dir, prompts[:3], params), strict=True):
        assert len({tuple(completion.token_ids) for completion in output.outputs}) > 1
        if place.device is not None:
            assert [c.token_ids for c in output.outputs] == [c.token_ids for c in expected.outputs]


PYRAMIDS: list[dict[str, Any]] = [
    {"pooling_function": "avg", "router_version": "v2"},
    {"pooling_function": "conv"},
    {"pooling_type": "random"},
]


@pytest.mark.parametrize("changes", PYRAMIDS, ids=str)
def test_other_pyramids(place: Place, tmp_path: Path, prompts: list[Prompt], changes: dict[str, Any]) -> None:
    model = with_pyramid(dataclasses.replace(MODEL, dtype=place.dtype), **changes)
    engine = write_random_engine(tmp_path / "other", model)
    params = dataclasses.replace(GREEDY, seed=5)
    outputs = place.load(engine).generate(prompts, params, use_tqdm=False)
    for output, expected in zip(outputs, alone(engine, prompts, params), strict=True):
        assert_near(output, expected, place)


def test_biases_and_kernels_that_do_not_fit(place: Place, engine_dir: Path) -> None:
    generator = np.random.default_rng(torch.initial_seed())
    prompts = [
        random_prompt(generator, (8, 8)) | {"router_bias": bias} for bias in (-MAX_ROUTER_BIAS, 0.0, MAX_ROUTER_BIAS)
    ]
    prompts[1]["route"] = [0, 0, 0]
    outputs = place.load(engine_dir).generate(prompts, GREEDY, use_tqdm=False)
    for output, expected in zip(outputs, alone(engine_dir, prompts), strict=True):
        assert_near(output, expected, place)
    assert outputs[2].pyramid.visual_tokens[-1] < outputs[0].pyramid.visual_tokens[-1]
    flat = random_prompt(generator, (1, 30)) | {"route": [2, None, None]}
    with pytest.raises(BatchError, match="does not fit the grid") as caught:
        place.load(engine_dir).generate([prompts[0], flat, prompts[2]], GREEDY, use_tqdm=False)
    for output, expected in zip(caught.value.outputs[::2], outputs[::2], strict=True):
        assert isinstance(output, RequestOutput)
        assert_near(output, expected, place)


def test_dense(place: Place, tmp_path: Path, prompts: list[Prompt]) -> None:
    model = dataclasses.replace(MODEL, dtype=place.dtype, reduction=NoReduction())
    engine = write_random_engine(tmp_path / "dense", model)
    for prompt in prompts:
        prompt.pop("route", None)
    outputs = place.load(engine).generate(prompts, GREEDY, use_tqdm=False)
    for output, expected in zip(outputs, alone(engine, prompts), strict=True):
        assert_near(output, expected, place)


def test_images_go_through_the_tower(place: Place, engine_dir: Path) -> None:
    runner, plain = place.load(engine_dir).engine.runner, LLM(engine_dir, device="cpu").engine.runner
    images = random_images(6)
    with torch.inference_mode():
        encoded, expected = runner.images.encoder.encode(images), plain.images.encoder.encode(images)
    for image, wanted in zip(encoded, expected, strict=True):
        torch.testing.assert_close(image.rows.cpu(), wanted.rows, atol=place.tolerance, rtol=0)
