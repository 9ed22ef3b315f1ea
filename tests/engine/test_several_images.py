"""Prompts with several images, with a processor that accepts several."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import LLM
from dpn_rt.model.reduction.reduction import NoReduction
from tests.engine.answers import GREEDY, assert_pool_is_full, assert_same, assert_same_tokens
from tests.engine.models import MODEL, ROUTER_ID, kv_bytes, random_images, random_weights, write_random_engine

GRIDS = [(12, 12), (4, 4), (8, 8), (3, 7), (1, 1), (2, 20)]
DENSE = dataclasses.replace(MODEL, reduction=NoReduction())


@pytest.fixture
def generator() -> np.random.Generator:
    seed = torch.initial_seed()
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_engine(tmp_path_factory.mktemp("engines") / "adaptive")


def load(engine_dir: Path, **options: Any) -> LLM:
    llm = LLM(engine_dir, **options)
    llm.processor.max_images = 4
    return llm


def ids(generator: np.random.Generator, count: int) -> list[int]:
    return [int(i) for i in generator.integers(3, ROUTER_ID, count)]


def prompt(generator: np.random.Generator, num_images: int) -> dict[str, Any]:
    """Images with 0 to 5 ids between them."""
    token_ids, embeds, grids = ids(generator, 2), [], []
    for _ in range(num_images):
        grid = GRIDS[generator.integers(len(GRIDS))]
        rows = generator.standard_normal((grid[0] * grid[1], 64)).astype(np.float32)
        embeds.append(torch.from_numpy(rows))
        grids.append(grid)
        token_ids += [-200, *ids(generator, int(generator.integers(6)))]
    media = {"multi_modal_data": {"image_embeds": embeds, "image_grid": grids}} if num_images else {}
    return {"prompt_token_ids": [*token_ids, *ids(generator, 3), ROUTER_ID], **media}


@pytest.mark.parametrize(
    "options",
    [{}, {"max_chunk_tokens": 7}, {"reuse_bytes": 2**22}, {"kv_cache_bytes": kv_bytes(900, 4), "block_size": 4}],
    ids=["whole", "chunked", "reuse", "few blocks"],
)
def test_batch_equals_alone(engine_dir: Path, generator: np.random.Generator, options: dict[str, Any]) -> None:
    prompts = [prompt(generator, number % 4) for number in range(9)]
    single = load(engine_dir)
    alone = [single.generate(each, GREEDY, use_tqdm=False)[0] for each in prompts]
    llm = load(engine_dir, **options)
    for _ in range(2):
        for output, expected in zip(llm.generate(prompts, GREEDY, use_tqdm=False), alone, strict=True):
            assert_same(output, expected)
    assert_pool_is_full(llm)


def test_dense_rows_are_those_of_one_image_with_text_within(tmp_path: Path, generator: np.random.Generator) -> None:
    """In a dense model, two images with text between them give the same result as one image with those rows."""
    llm = load(write_random_engine(tmp_path / "dense", DENSE))
    table = dict(random_weights(DENSE))["embed_tokens.weight"]
    asked = prompt(generator, 3)
    token_ids, media = asked["prompt_token_ids"], asked["multi_modal_data"]
    first, *_, last = [i for i, token_id in enumerate(token_ids) if token_id == -200]
    images = iter(media["image_embeds"])
    rows = [next(images) if i == -200 else table[i][None] for i in token_ids[first : last + 1]]
    joined = {
        "prompt_token_ids": [*token_ids[: first + 1], *token_ids[last + 1 :]],
        "multi_modal_data": {"image_embeds": torch.cat(rows)},
    }
    output, expected = (llm.generate(each, GREEDY, use_tqdm=False)[0] for each in (asked, joined))
    assert_same_tokens(output, expected)
    assert output.pyramid.kv_lengths == expected.pyramid.kv_lengths


def test_order_and_repetition_of_images_that_are_encoded(tmp_path: Path) -> None:
    """The tower computes the rows of each image once, and they are used at every place of the image."""
    llm = load(write_random_engine(tmp_path / "adaptive"))
    one, other = random_images(2)
    outputs = {}
    for images in ((one, other), (other, one), (one, one), (other, other)):
        asked = {"prompt_token_ids": [1, -200, 5, -200, 7, ROUTER_ID], "multi_modal_data": {"image": list(images)}}
        outputs[images] = llm.generate(asked, GREEDY, use_tqdm=False)[0]
        rows = [llm.engine.runner.images.encode([image])[0].rows for image in images]
        embedded = {**asked, "multi_modal_data": {"image_embeds": rows, "image_grid": [one.grid] * 2}}
        assert_same(outputs[images], llm.generate(embedded, GREEDY, use_tqdm=False)[0])
    assert len({tuple(map(float, each.outputs[0].logprobs[0].values())) for each in outputs.values()}) == 4  # type: ignore[index]
