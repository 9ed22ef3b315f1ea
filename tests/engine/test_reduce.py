"""Training-free reductions in the engine: mixed batches, preemption, siblings, forced rows, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.errors import BatchError, ConfigError, RequestError
from dpn_rt.model.decoder import Stage
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.model.reduction.spec import parse_spec
from dpn_rt.model.stage_batch import StageBatch
from tests.engine.answers import (
    GREEDY,
    all_logprobs,
    assert_ids_are,
    assert_pool_is_full,
    assert_same,
    assert_same_tokens,
)
from tests.engine.margins import draw_clear_choices
from tests.engine.models import MODEL, kv_bytes, random_images, write_random_engine

DENSE = dataclasses.replace(MODEL, reduction=NoReduction())  # 7 layers
SPECS = [
    "none",
    "fastv:k=2,ratio=0.5",
    "fastv:k=2,ratio=0.9",
    "pyramiddrop:layers=2-4-6,ratios=0.5-0.25-0.1",
    "pyramiddrop:layers=4,ratios=0",
    "random:layer=0,keep=0.3",
    "random:layer=4,keep=0.6,seed=7",
    "random:layer=2,keep=0.6,positions=keep",
    "pool:kernel=2x2,layer=0",
    "pool:kernel=1x2,layer=4,function=max",
    "divprune:keep=0.2",
    "pool:kernel=2x1,layer=0+fastv:k=2,ratio=0.4",
    "divprune:keep=0.5+pyramiddrop:layers=2-6,ratios=0.7-0.3",
    "random:layer=2,keep=0.8,positions=keep+random:layer=4,keep=0.5",
]
GRIDS = [(12, 12), (4, 4), None, (5, 5), (8, 8), (3, 7), (1, 1), (10, 6)]


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(torch.initial_seed())


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_engine(tmp_path_factory.mktemp("engines") / "dense", DENSE)


def load(engine_dir: Path, reduce: Any = SPECS, **options: Any) -> LLM:
    llm = LLM(engine_dir, reduce=reduce, **options)
    llm.processor.max_images = 3
    return llm


def prompt(generator: np.random.Generator, spec: str | None, grids: list[tuple[int, int]]) -> dict[str, Any]:
    ids, embeds = generator.integers(3, 99, 5).tolist(), []
    for height, width in grids:
        ids += [-200, *generator.integers(3, 99, int(generator.integers(5))).tolist()]
        embeds.append(torch.from_numpy(generator.standard_normal((height * width, 64)).astype(np.float32)))
    media = {"multi_modal_data": {"image_embeds": embeds, "image_grid": grids}} if grids else {}
    return {"prompt_token_ids": [*ids, *generator.integers(3, 99, 3).tolist()], "reduce": spec, **media}


def cases() -> list[tuple[str, list[tuple[int, int]]]]:
    """Each SPEC with an image, text alone, and several images: the SPEC and the images' grids."""
    grids = [[grid] if grid else [] for grid in itertools.islice(itertools.cycle(GRIDS), len(SPECS))]
    several = [(SPECS[1], [(4, 4), (5, 3)]), (SPECS[3], [(2, 2), (1, 7), (6, 6)]), (SPECS[11], [(4, 4), (6, 2)])]
    return [*zip(SPECS, grids, strict=True), *several]


@pytest.mark.parametrize(
    "options",
    [{}, {"max_chunk_tokens": 7}, {"reuse_bytes": 2**22}, {"kv_cache_bytes": kv_bytes(700, 4, DENSE), "block_size": 4}],
    ids=["whole", "chunked", "reuse", "few blocks"],
)
def test_batch_equals_alone(engine_dir: Path, generator: np.random.Generator, options: dict[str, Any]) -> None:
    """Also an engine with the boundaries of one reduction alone against one with all of them."""
    made, alone = [], []
    for spec, grids in cases():
        llm = load(engine_dir, [spec])
        asked, output = draw_clear_choices(
            partial(prompt, generator, spec, grids),
            lambda asked, llm=llm: llm.generate(asked, GREEDY, use_tqdm=False)[0],
        )
        made.append(asked)
        alone.append(output)
    llm = load(engine_dir, **options)
    for _ in range(2):
        order = generator.permutation(len(made))
        outputs = llm.generate([made[i] for i in order], GREEDY, use_tqdm=False)
        for index, output in zip(order, outputs, strict=True):
            expected = alone[index]
            assert output.error is None and output.pyramid.kept == expected.pyramid.kept
            assert output.pyramid.kv_lengths[-1] == expected.pyramid.kv_lengths[-1]
            assert_same_tokens(output, expected)
    assert_pool_is_full(llm)
    if "block_size" in options:
        assert llm.engine.num_preemptions > 0


def test_kept_rows_are_counted_and_ascend(engine_dir: Path, generator: np.random.Generator) -> None:
    llm = load(engine_dir)
    for spec in SPECS[1:]:
        output = llm.generate(prompt(generator, spec, [(8, 9)]), GREEDY, use_tqdm=False)[0]
        chain = parse_spec(spec, 7)
        grid, sizes, first = (8, 9), [], (8, 9)
        for cut in chain.cuts:
            first = grid if cut.index == 0 else first
            grid = cut.step.grid_after(cut.index, first, grid)
            sizes.append(grid[0] * grid[1])
        assert [None if kept is None else len(kept) for kept in output.pyramid.kept] == [
            None if cut.step.method == "pool" else size for cut, size in zip(chain.cuts, sizes, strict=True)
        ]
        lists = [kept for kept in output.pyramid.kept if kept is not None]
        assert all(kept == sorted(set(kept)) for kept in lists)
        assert all(set(later) <= set(kept) for kept, later in itertools.pairwise(lists))
        assert output.pyramid.visual_tokens[-1] == sizes[-1]


def test_forced_rows_give_the_same(engine_dir: Path, generator: np.random.Generator) -> None:
    llm = load(engine_dir)
    for spec in SPECS[1:]:
        asked = prompt(generator, spec, [(6, 6)])
        output = llm.generate(asked, GREEDY, use_tqdm=False)[0]
        assert_same(llm.generate({**asked, "kept": output.pyramid.kept}, GREEDY, use_tqdm=False)[0], output)
    asked = prompt(generator, SPECS[3], [(6, 6), (4, 2)])
    output = llm.generate(asked, GREEDY, use_tqdm=False)[0]
    assert [len(each) for each in output.pyramid.kept] == [2, 2, 2]  # type: ignore[arg-type]
    assert_same(llm.generate({**asked, "kept": output.pyramid.kept}, GREEDY, use_tqdm=False)[0], output)
    other = [list(range(18)), list(range(9)), [2, 5, 7]]
    forced = llm.generate({**prompt(generator, SPECS[3], [(6, 6)]), "kept": other}, GREEDY, use_tqdm=False)[0]
    assert forced.pyramid.kept == other


def test_several_completions(engine_dir: Path, generator: np.random.Generator) -> None:
    llm = load(engine_dir)
    asked = prompt(generator, SPECS[1], [(6, 6)])
    params = SamplingParams(n=3, temperature=1e-5, max_tokens=8, ignore_eos=True)  # drawn, and the most probable
    output = llm.generate(asked, params, use_tqdm=False)[0]
    single = llm.generate(asked, dataclasses.replace(GREEDY, max_tokens=8), use_tqdm=False)[0]
    for each in output.outputs:
        assert_ids_are(each.token_ids, single.outputs[0].token_ids, all_logprobs(single))


def test_the_default_is_the_first(engine_dir: Path, generator: np.random.Generator) -> None:
    asked = prompt(generator, None, [(6, 6)])
    for spec in SPECS[:4]:
        llm = load(engine_dir, [spec, *SPECS])
        assert_same(
            llm.generate(asked, GREEDY, use_tqdm=False)[0],
            llm.generate({**asked, "reduce": spec}, GREEDY, use_tqdm=False)[0],
        )
    as_mapping = {"method": "fastv", "k": 2, "ratio": 0.5}
    output = load(engine_dir, as_mapping).generate(asked, GREEDY, use_tqdm=False)[0]
    assert_same(output, load(engine_dir, SPECS[1]).generate(asked, GREEDY, use_tqdm=False)[0])


def test_other_ratios_at_loaded_boundaries(engine_dir: Path, generator: np.random.Generator) -> None:
    llm = load(engine_dir, "fastv:k=2")
    output = llm.generate(prompt(generator, "fastv:k=2,ratio=0.75", [(4, 4)]), GREEDY, use_tqdm=False)[0]
    assert output.pyramid.visual_tokens == [16, 4]
    output = llm.generate(prompt(generator, "pool:layer=0", [(4, 4)]), GREEDY, use_tqdm=False)[0]
    assert output.pyramid.visual_tokens == [4, 4]
    with pytest.raises(RequestError, match=r"no boundary before layer 3 \(it has: 2\)"):
        llm.generate(prompt(generator, "fastv:k=3", [(4, 4)]), GREEDY, use_tqdm=False)


def test_images_from_the_encoder(engine_dir: Path) -> None:
    """Reduced before the decoder, from the image cache, and as embeddings."""
    llm = load(engine_dir, reuse_bytes=2**22)
    image = random_images(1)[0]
    rows = llm.engine.runner.images.encode([image])[0].rows
    for spec in ("divprune:keep=0.2", "pool:kernel=2x2", "random:keep=0.4", "fastv:k=2", "none"):
        asked = {"prompt_token_ids": [1, 5, -200, 7, 8], "reduce": spec}
        given = {"image_embeds": rows, "image_grid": image.grid}
        expected = load(engine_dir).generate({**asked, "multi_modal_data": given}, GREEDY, use_tqdm=False)[0]
        for _ in range(2):
            output = llm.generate({**asked, "multi_modal_data": {"image": image}}, GREEDY, use_tqdm=False)[0]
            assert_same(output, expected)
            assert output.pyramid.kept == expected.pyramid.kept


def test_fewer_rows_take_fewer_blocks(engine_dir: Path, generator: np.random.Generator) -> None:
    """A pool for three dense requests holds more that are reduced; by the scheduler's own count."""
    most = {}
    for spec in ("none", "fastv:k=1,ratio=0.9", "pool:kernel=4x4"):
        llm = load(engine_dir, spec, kv_cache_bytes=kv_bytes(3 * 180, 4, DENSE), block_size=4)
        made = [prompt(generator, None, [(12, 12)]) for _ in range(24)]
        for number, each in enumerate(made):
            llm.engine.add_request(str(number), llm.processor.process(each), GREEDY)
        llm.engine.step()
        most[spec] = llm.engine.num_running
        while any(llm.engine.is_unfinished(str(number)) for number in range(24)):
            llm.engine.step()
    assert most["none"] == 3 and most["fastv:k=1,ratio=0.9"] >= 7 and most["pool:kernel=4x4"] >= 12


BAD_SPECS: list[tuple[Any, str]] = [
    ("sparse", "method 'sparse', expected one of"),
    ("fastv:k=2,keep=3", "fastv has no 'keep'"),
    ("fastv:k=7", "k=7: expected 1 to 6"),
    ("fastv:ratio=1.5", "ratio=1.5: expected a share from 0 to 1"),
    ("fastv:ratio=nan", "ratio=nan"),
    ("fastv:k=x", "k='x', expected a whole number"),
    ("fastv:k=2,k=3", "each key once"),
    ("pyramiddrop:layers=2-9,ratios=0.5-0.1", "expected layers from 1 to 6"),
    ("pyramiddrop", r"^reduce='pyramiddrop': pyramiddrop: layers=8-16-24: expected layers from 1 to 6$"),
    ("pyramiddrop:layers=4-2,ratios=0.5-0.1", "expected them to rise"),
    ("pyramiddrop:layers=2-4,ratios=0.1-0.5", "rows never come back"),
    ("pyramiddrop:layers=2-4,ratios=0.5", "expected as many of both"),
    ("random:layer=7", "layer=7: expected a layer from 0 to 6"),
    ("random:layer=0,positions=keep", "no positions before the decoder"),
    ("random:seed=-1", "seed=-1"),
    ("random:seed=9007199254740993", "seed=9007199254740993: expected 0 to 9007199254740992"),
    ("pool:kernel=0x2", "kernel=0x2"),
    ("pool:kernel=2", "expected height and width joined by x"),
    ("fastv:k=2+pool:layer=4", "the step before leaves rows that are no grid"),
    ("fastv:k=2+random:layer=2", "expected steps whose layers rise"),
    ("fastv:k=2+divprune", "expected steps whose layers rise"),
    ({"method": "fastv", "k": 1.5}, "k=1.5, expected a whole number"),
    ({"k": 2}, "method None"),
    (5, "expected a text such as"),
    ("", "method ''"),
]


@pytest.mark.parametrize(("spec", "named"), BAD_SPECS, ids=str)
def test_bad_specs(engine_dir: Path, generator: np.random.Generator, spec: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load(engine_dir, [spec])
    asked = [prompt(generator, spec, [(4, 4)]), prompt(generator, "none", [(4, 4)])]
    with pytest.raises(BatchError) as caught:
        load(engine_dir).generate(asked, GREEDY, use_tqdm=False)
    assert list(caught.value.errors) == [0]
    with pytest.raises(RequestError, match=named):
        raise caught.value.errors[0]


def test_bad_kept_rows(engine_dir: Path, generator: np.random.Generator) -> None:
    llm = load(engine_dir)
    asked = prompt(generator, "pyramiddrop:layers=2-4,ratios=0.5-0.25", [(4, 4)])
    good = [list(range(8)), [0, 1, 2, 3]]
    bad: list[tuple[Any, str]] = [
        ([good[0]], "expected a list of 2 entries"),
        ("ab", "expected a list of 2 entries"),
        ([good[0][:7], good[1]], r"kept\[0\]: 7 rows, expected 8"),
        ([good[0][::-1], good[1]], r"kept\[0\]: expected rows that rise"),
        ([[0, 0, 1, 2, 3, 4, 5, 6], good[1]], r"kept\[0\]: expected rows that rise"),
        ([[*range(7), 16], good[1]], r"kept\[0\]: row 16"),
        ([[-1, *range(7)], good[1]], r"kept\[0\]: row -1"),
        ([good[0], [0, 1, 2, 9]], r"kept\[1\]: row 9, expected some of the 8"),
        ([good[0], [0, 1, 2, 2.5]], r"kept\[1\]: expected a list of 4 row numbers"),
        ([good[0], None], r"kept\[1\]: expected a list of 4 row numbers"),
    ]
    for kept, named in bad:
        with pytest.raises(RequestError, match=named):
            llm.generate({**asked, "kept": kept}, GREEDY, use_tqdm=False)
    pooled = prompt(generator, "pool:kernel=2x2+fastv:k=2", [(4, 4)])
    with pytest.raises(RequestError, match=r"kept\[0\]: pool pools rows, expected null"):
        llm.generate({**pooled, "kept": [[0], [0, 1]]}, GREEDY, use_tqdm=False)
    assert llm.generate({**pooled, "kept": [None, [1, 3]]}, GREEDY, use_tqdm=False)[0].pyramid.kept == [None, [1, 3]]
    for other in (prompt(generator, "none", [(4, 4)]), prompt(generator, SPECS[1], [])):
        with pytest.raises(RequestError, match="no reduction that keeps rows of an image"):
            llm.generate({**other, "kept": good}, GREEDY, use_tqdm=False)


def test_what_a_request_kept_may_be_given_back(engine_dir: Path, generator: np.random.Generator) -> None:
    """Also where nothing is kept: without a reduction, without an image, and by a model that was trained to reduce."""
    llm, grids = load(engine_dir), ([(8, 9)], [(4, 4), (3, 5)], [])
    for spec, images in itertools.product([*SPECS, "none"], grids):
        asked = prompt(generator, spec, images)
        output = llm.generate(asked, GREEDY, use_tqdm=False)[0]
        again = llm.generate({**asked, "kept": output.pyramid.kept}, GREEDY, use_tqdm=False)[0]
        assert again.pyramid.kept == output.pyramid.kept
        assert_same_tokens(again, output)


def test_a_trained_model_reduces_as_it_was_trained_or_not_at_all(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    path = write_random_engine(tmp_path / "adaptive")
    llm, dense = LLM(path), LLM(path, reduce="none")
    asked = prompt(generator, None, [(8, 8)])
    asked["prompt_token_ids"].append(99)
    output = llm.generate({**asked, "reduce": "none"}, GREEDY, use_tqdm=False)[0]
    assert output.pyramid.visual_tokens == [64] * 4 and output.pyramid.experts == [None] * 3
    expected = dense.generate(asked, GREEDY, use_tqdm=False)[0]
    assert expected.pyramid.visual_tokens == [64]
    assert_same_tokens(output, expected)
    with pytest.raises(RequestError, match="a trained reduction of its own"):
        llm.generate({**asked, "reduce": "fastv"}, GREEDY, use_tqdm=False)
    with pytest.raises(ConfigError, match="a trained reduction of its own"):
        LLM(path, reduce="fastv:k=2")
    with pytest.raises(ConfigError, match="expected at least one SPEC"):
        LLM(path, reduce=[])


@pytest.mark.parametrize("max_chunk_tokens", [None, 5])
def test_keys_that_rank_rows_are_not_computed_again(
    engine_dir: Path, generator: np.random.Generator, monkeypatch: pytest.MonkeyPatch, max_chunk_tokens: int | None
) -> None:
    """Of all sequences at such a boundary, unless one of them is pooled there."""
    ranked, pooled = "pyramiddrop:layers=2-4,ratios=0.5-0.25", "pool:kernel=2x2,layer=4"
    llm = load(engine_dir, ["none", ranked, pooled, "fastv:k=2,ratio=0.5"], max_chunk_tokens=max_chunk_tokens)
    stages: dict[Stage, int] = {}
    seen: dict[int, bool] = {}
    forward = Stage.forward
    width = MODEL.decoder.num_kv_heads * MODEL.decoder.head_dim

    def spied(stage: Stage, x: torch.Tensor, batch: StageBatch, *pool: torch.Tensor | None) -> torch.Tensor:
        if not batch.is_decode:
            assert batch.keys is None or batch.keys.shape == (len(x), width)
            seen[stages.setdefault(stage, len(stages))] = batch.keys is not None
        return forward(stage, x, batch, *pool)  # type: ignore[arg-type]

    monkeypatch.setattr(Stage, "forward", spied)

    def reuses(*specs: str) -> dict[int, bool]:
        seen.clear()
        llm.generate([prompt(generator, spec, [(4, 4)]) for spec in specs], GREEDY, use_tqdm=False)
        return dict(seen)

    assert reuses(ranked) == {0: False, 1: True, 2: True}
    assert reuses(ranked, "none", "fastv:k=2,ratio=0.5") == {0: False, 1: True, 2: True}
    assert reuses(ranked, pooled) == {0: False, 1: True, 2: False}
    assert reuses("fastv:k=2,ratio=0.5", "none") == {0: False, 1: False, 2: False}


def test_the_pyramid_tells_what_each_stage_saw(engine_dir: Path, generator: np.random.Generator) -> None:
    """Stages come from all reductions that are loaded; the steps name those of the request's own."""
    llm = load(engine_dir)  # boundaries before layers 2, 4 and 6
    drops = "pyramiddrop:layers=2-4-6,ratios=0.5-0.25-0.1"
    pool, fastv = "pool:kernel=2x1,layer=0,function=avg", "fastv:k=2,ratio=0.4"
    late = "pool:kernel=1x2,layer=4,function=max"
    for spec, grids, steps, patches in (
        ("none", [(8, 9)], [], [(1, 1)] * 4),
        (drops, [(8, 9)], [(1, drops), (2, drops), (3, drops)], [(1, 1)] * 4),
        ("divprune:keep=0.2", [(8, 9)], [(0, "divprune:keep=0.2")], [(1, 1)] * 4),
        (f"{pool}+{fastv}", [(8, 9)], [(0, pool), (1, fastv)], [(2, 1)] * 4),
        (f"{pool}+{fastv}", [(1, 9)], [(0, pool), (1, fastv)], [(1, 1)] * 4),  # the kernel is higher than the grid
        (late, [(4, 5), (2, 2)], [(2, late)], [(1, 1), (1, 1), (1, 2), (1, 2)]),
        (f"{pool}+{late}", [(4, 5)], [(0, pool), (2, late)], [(2, 1), (2, 1), (2, 2), (2, 2)]),
        (fastv, [], [], [(1, 1)] * 4),
    ):
        pyramid = llm.generate(prompt(generator, spec, grids), GREEDY, use_tqdm=False)[0].pyramid
        assert pyramid.reduction == parse_spec(spec, 7).spec
        assert [(step.stage, step.spec) for step in pyramid.steps] == steps
        assert pyramid.image_grid == (grids[0] if grids else None)
        assert pyramid.patches_per_token == patches
        for step, kept in zip(pyramid.steps, pyramid.kept, strict=bool(grids)):
            if kept is not None:
                assert pyramid.visual_tokens[step.stage] == len(kept)
