"""Prompts with a common prefix share computed rows. Answers do not change, and images are never confused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.cache.image_cache import ImageCache
from dpn_rt.engine.prefix_cache import PrefixCache
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.outputs import RequestOutput
from tests.engine.answers import GREEDY, assert_pool_is_full, assert_same
from tests.engine.models import ROUTER_ID, kv_bytes, kv_geometry, write_random_engine

Prompt = dict[str, Any]


@pytest.fixture(scope="module", params=["adaptive", "dense"])
def engine_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / request.param
    if request.param == "adaptive":
        return write_random_engine(path)
    from dataclasses import replace

    from tests.engine.models import MODEL

    return write_random_engine(path, replace(MODEL, reduction=NoReduction()))


@pytest.fixture(scope="module")
def plain(engine_dir: Path) -> LLM:
    return LLM(engine_dir)


@pytest.fixture
def generator() -> np.random.Generator:
    seed = torch.initial_seed()
    return np.random.default_rng(seed)


def image(generator: np.random.Generator, grid: tuple[int, int] = (8, 8)) -> torch.Tensor:
    rows = generator.standard_normal((grid[0] * grid[1], 64)).astype(np.float32)
    return torch.from_numpy(rows)


def ids(generator: np.random.Generator, count: int) -> list[int]:
    return [int(i) for i in generator.integers(3, ROUTER_ID, count)]


def prompt(before: list[int], rows: torch.Tensor, grid: tuple[int, int], question: list[int]) -> Prompt:
    return {
        "prompt_token_ids": [*before, -200, *question, ROUTER_ID],
        "multi_modal_data": {"image_embeds": rows, "image_grid": grid},
    }


def ask(llm: LLM, asked: Prompt) -> RequestOutput:
    return llm.generate(asked, GREEDY, use_tqdm=False)[0]


def assert_as_without_caches(plain: LLM, answers: list[tuple[Prompt, RequestOutput]]) -> None:
    """Prompts and their outputs; `plain` answers them in one batch, which is faster than one after another."""
    prompts = [asked for asked, _ in answers]
    for (_, output), expected in zip(answers, plain.generate(prompts, GREEDY, use_tqdm=False), strict=True):
        assert_same(output, expected)


def caches(llm: LLM) -> tuple[PrefixCache, ImageCache]:
    runner = llm.engine.runner
    assert runner.prefix_cache is not None and runner.images.cache is not None
    return runner.prefix_cache, runner.images.cache


@pytest.mark.parametrize("before", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("chunk", [None, 5])
def test_second_questions_about_an_image(
    engine_dir: Path, plain: LLM, generator: np.random.Generator, before: int, chunk: int | None
) -> None:
    llm = LLM(engine_dir, reuse_bytes=2**24, max_chunk_tokens=chunk)
    prefix, _ = caches(llm)
    answers = []
    for grid in ((8, 8), (3, 7), (1, 5)):
        start, rows = ids(generator, before), image(generator, grid)
        for number in range(4):
            asked = prompt(start, rows, grid, ids(generator, 1 + 5 * number))
            hits = prefix.statistics.image_hits
            answers.append((asked, ask(llm, asked)))
            assert prefix.statistics.image_hits - hits == (number > 0)
    assert_as_without_caches(plain, answers)
    assert_pool_is_full(llm)


@pytest.mark.parametrize("engine_dir", ["dense"], indirect=True)
def test_an_image_that_ends_its_prompt_counts_as_asked_for(engine_dir: Path, generator: np.random.Generator) -> None:
    """It has no entry of its own, but its rows may be kept without one, which counts as a hit."""
    llm = LLM(engine_dir, reuse_bytes=2**24)
    data = {"image_embeds": image(generator), "image_grid": (8, 8)}
    ask(llm, {"prompt_token_ids": [*ids(generator, 3), -200], "multi_modal_data": data})
    assert llm.engine.runner.reuse_statistics()[2:4] == (1, 0)


def test_images_never_mix(engine_dir: Path, plain: LLM, generator: np.random.Generator) -> None:
    llm = LLM(engine_dir, reuse_bytes=2**24)
    start, question = ids(generator, 20), ids(generator, 6)
    one = image(generator)
    other = one.clone()
    other[-1, -1] += 1.0  # the smallest difference in the last row
    for rows, grid in ((one, (8, 8)), (other, (8, 8)), (one, (4, 16)), (one, (8, 8))):
        asked = prompt(start, rows, grid, question)
        assert_same(ask(llm, asked), ask(plain, asked))
    assert caches(llm)[0].statistics.image_hits == 1
    # The same image after other text.
    asked = prompt([*start[:-1], start[-1] % 90 + 3], one, (8, 8), question)
    assert_same(ask(llm, asked), ask(plain, asked))
    assert caches(llm)[0].statistics.image_hits == 1


def test_conversations_in_text(engine_dir: Path, plain: LLM, generator: np.random.Generator) -> None:
    llm = LLM(engine_dir, reuse_bytes=2**24)
    text = ids(generator, 33)
    for _ in range(4):
        asked = {"prompt_token_ids": text}
        output = ask(llm, asked)
        assert_same(output, ask(plain, asked))
        text = [*text, *output.outputs[0].token_ids, *ids(generator, 7)]
    same = {"prompt_token_ids": text[:32]}  # ends with a whole block, of which the last row must be computed
    assert_same(ask(llm, same), ask(plain, same))
    assert caches(llm)[0].statistics.hit_rows >= 32 + 48 + 64 + 16
    assert_pool_is_full(llm)


@pytest.mark.parametrize("chunk", [None, 9])
def test_many_together_with_few_blocks(
    engine_dir: Path, plain: LLM, generator: np.random.Generator, chunk: int | None
) -> None:
    num_bytes = kv_bytes(170, 4, plain.model)
    llm = LLM(
        engine_dir, reuse_bytes=2**16, kv_cache_bytes=num_bytes, block_size=4, max_num_seqs=4, max_chunk_tokens=chunk
    )
    starts, images = [ids(generator, n) for n in (3, 9)], [image(generator) for _ in range(3)]
    asked: list[Prompt] = []
    for _ in range(40):
        rows = images[generator.integers(3)]
        asked.append(prompt(starts[generator.integers(2)], rows, (8, 8), ids(generator, int(generator.integers(1, 9)))))
        if generator.random() < 0.3:
            asked.append({"prompt_token_ids": [*starts[1], *ids(generator, int(generator.integers(1, 30)))]})
    outputs = llm.generate(asked, GREEDY, use_tqdm=False)
    for output, expected in zip(outputs, plain.generate(asked, GREEDY, use_tqdm=False), strict=True):
        assert_same(output, expected)
    statistics = caches(llm)[0].statistics
    assert statistics.image_hits > 0 and statistics.evictions > 0
    assert_pool_is_full(llm)
    caches(llm)[0].clear()
    cache = llm.engine.runner.cache
    assert cache.num_unused_blocks == cache.num_blocks and not cache._num_users.any() and not cache._num_holds.any()


def test_rows_beside_the_blocks_stay_within_their_bound(engine_dir: Path, generator: np.random.Generator) -> None:
    llm = LLM(engine_dir, reuse_bytes=40_000)  # two images of 64 rows of 256 bytes
    for _ in range(6):
        ask(llm, prompt(ids(generator, 3), image(generator), (8, 8), ids(generator, 3)))
        assert caches(llm)[0]._row_bytes <= 40_000
    assert_pool_is_full(llm)


def test_an_image_given_up_within_a_batch_is_kept_anew(
    engine_dir: Path, plain: LLM, generator: np.random.Generator
) -> None:
    start, question = ids(generator, 3), ids(generator, 5)
    one, other = image(generator), image(generator)
    asked = [prompt(start, rows, (8, 8), question) for rows in (one, other)]
    llm = LLM(engine_dir, reuse_bytes=(64 + 3) * 64 * 4)  # the rows of one image
    ask(llm, asked[0])
    llm.generate(asked[::-1], GREEDY, use_tqdm=False)  # one is found, evicted for the other, and kept again
    for _ in range(3):
        assert_same(ask(llm, asked[0]), ask(plain, asked[0]))
    assert_pool_is_full(llm)


def test_few_blocks_of_which_the_images_own_are_given_up(
    engine_dir: Path, plain: LLM, generator: np.random.Generator
) -> None:
    start, rows = ids(generator, 2), image(generator, (6, 6))
    short, long = prompt(start, rows, (6, 6), ids(generator, 3)), prompt(start, rows, (6, 6), ids(generator, 60))
    for each in (short, long):
        each["route"] = [0] * len(plain.engine.runner.backend.reducers)
    least = kv_bytes(2 + 36 + 61 + GREEDY.max_tokens, 16, plain.model)
    block_bytes = kv_geometry(plain.model).block_bytes(16)
    for extra in range(4):
        llm = LLM(engine_dir, reuse_bytes=2**20, kv_cache_bytes=least + extra * block_bytes)
        for asked in (short, long, short, short, long):
            assert_same(ask(llm, asked), ask(plain, asked))
        assert_pool_is_full(llm)


def test_a_pool_in_which_sharing_takes_a_block_too_many(
    engine_dir: Path, plain: LLM, generator: np.random.Generator
) -> None:
    asked = prompt(ids(generator, 2), image(generator, (6, 6)), (6, 6), ids(generator, 2))  # 41 rows, 3 blocks
    llm = LLM(engine_dir, reuse_bytes=2**20, kv_cache_bytes=kv_bytes(41 + 4, 16, plain.model))
    brief = dataclasses.replace(GREEDY, max_tokens=4)
    for _ in range(3):
        outputs = [each.generate(asked, brief, use_tqdm=False)[0] for each in (llm, plain)]
        assert_same(*outputs)
    assert_pool_is_full(llm)


@pytest.mark.parametrize("engine_dir", ["dense"], indirect=True)  # with routers <ROUTER> comes last
def test_a_prompt_that_ends_in_its_image(engine_dir: Path, plain: LLM, generator: np.random.Generator) -> None:
    rows = image(generator, (6, 6))
    ending = prompt(ids(generator, 2), rows, (6, 6), [])
    ending["prompt_token_ids"] = ending["prompt_token_ids"][:-1]
    others = [prompt(ids(generator, 4), image(generator, (6, 6)), (6, 6), ids(generator, 2)) for _ in range(2)]
    llm = LLM(engine_dir, reuse_bytes=2**20)
    ask(llm, ending)
    for batch in ([ending], [others[0], ending], [ending, others[0]], [others[0], ending, others[1]]):
        for output, asked in zip(llm.generate(batch, GREEDY, use_tqdm=False), batch, strict=True):
            assert_same(output, ask(plain, asked))
    assert_pool_is_full(llm)


def test_a_failed_decode_leaves_a_prefill_in_progress_alone(
    engine_dir: Path, plain: LLM, generator: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(engine_dir, reuse_bytes=2**20, max_chunk_tokens=4)
    engine = llm.engine
    text = ids(generator, 40)
    ask(llm, {"prompt_token_ids": text})  # keeps two blocks, which the next one shares
    other = {"prompt_token_ids": [*text, *ids(generator, 40)]}
    long = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    engine.add_request("fails", llm.processor.process({"prompt_token_ids": text[:3]}), long)
    engine.step()
    engine.add_request("goes on", llm.processor.process(other), GREEDY)
    for _ in range(3):
        engine.step()
    assert engine.runner._prefill is not None
    finished: list[RequestOutput] = []
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "decode", lambda batch: 1 / 0)
        while engine.is_unfinished("fails"):
            finished += engine.step().finished
    while engine.num_unfinished:
        finished += engine.step().finished
    assert [output.request_id for output in finished] == ["fails", "goes on"]
    assert_same(finished[1], ask(plain, other))
    assert_pool_is_full(llm)


def test_image_cache_forgets_the_least_recently_used() -> None:
    cache = ImageCache(max_bytes=3 * 64)
    rows = [torch.full((4, 4), float(i)) for i in range(5)]
    for i in range(3):
        cache.insert(bytes([i]), rows[i])
    assert cache.find(b"\0") is not None
    cache.insert(b"\3", rows[3])
    assert cache.find(b"\1") is None, "asked for least recently"
    found = cache.find(b"\0")
    assert found is not None and torch.equal(found, rows[0]) and cache.num_bytes == 3 * 64
    cache.insert(b"large", torch.zeros(100, 100))
    assert len(cache) == 3
    assert (cache.queries, cache.hits) == (3, 2)


def test_an_aborted_prefill_is_not_kept(engine_dir: Path, plain: LLM, generator: np.random.Generator) -> None:
    llm = LLM(engine_dir, reuse_bytes=2**24, max_chunk_tokens=4)
    asked = prompt(ids(generator, 20), image(generator), (8, 8), ids(generator, 9))
    llm.engine.add_request("long", llm.processor.process({"prompt_token_ids": [1, 2, 3]}), GREEDY)
    llm.engine.step()
    llm.engine.add_request("a", llm.processor.process(asked), GREEDY)
    for _ in range(6):
        llm.engine.step()
    llm.engine.abort("a")
    while llm.engine.num_unfinished:
        llm.engine.step()
    assert_same(ask(llm, asked), ask(plain, asked))
    assert_pool_is_full(llm)


def with_images(texts: list[list[int]], images: list[tuple[torch.Tensor, tuple[int, int]]]) -> Prompt:
    """A prompt of texts with an image between each two of them."""
    first, *others = texts
    ids = [*first, *(i for text in others for i in (-200, *text)), ROUTER_ID]
    embeds, grids = [rows for rows, _ in images], [grid for _, grid in images]
    return {"prompt_token_ids": ids, "multi_modal_data": {"image_embeds": embeds, "image_grid": grids}}


@pytest.mark.parametrize("chunk", [None, 5])
def test_earlier_images_are_reused(
    engine_dir: Path, plain: LLM, generator: np.random.Generator, chunk: int | None
) -> None:
    """Turns of a conversation, each with one more image; then the same with other images after the first."""
    llm = LLM(engine_dir, reuse_bytes=2**24, max_chunk_tokens=chunk)
    llm.processor.max_images = plain.processor.max_images = 4
    prefix, _ = caches(llm)
    grids = [(2, 3), (4, 4), (1, 5), (3, 1)]
    answers = []
    for before in (0, 1, 15, 16, 17, 40):
        texts = [ids(generator, count) for count in (before, int(generator.integers(0, 20)), 0, 1)]
        images = [(image(generator, grid), grid) for grid in grids]
        for count in range(1, 5):
            question = ids(generator, 1 + 4 * count)
            hits = prefix.statistics.image_hits
            asked = with_images([*texts[:count], question], images[:count])
            answers.append((asked, ask(llm, asked)))
            assert prefix.statistics.image_hits - hits == count - 1
        other = [images[0], (image(generator, (4, 4)), (4, 4)), *images[2:]]
        hits = prefix.statistics.image_hits
        for number in range(2):
            asked = with_images([*texts, ids(generator, 3)], other)
            answers.append((asked, ask(llm, asked)))
            assert prefix.statistics.image_hits - hits == (1, 1 + 4)[number]
        swapped = [images[1], images[0], *images[2:]]
        asked = with_images([*texts, ids(generator, 3)], swapped)
        answers.append((asked, ask(llm, asked)))
        assert prefix.statistics.image_hits - hits == 5
    assert_as_without_caches(plain, answers)
    assert_pool_is_full(llm)
