"""Reductions of images in tiles: newline rows stay, ranks go over all tiles, grids are pooled one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.errors import RequestError
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.model.reduction.grid import num_visual
from dpn_rt.model.reduction.spec import parse_spec
from dpn_rt.outputs import RequestOutput
from dpn_rt.reference import EagerDpn
from dpn_rt.reference.reduced import EagerReduced
from tests.engine.answers import assert_pool_is_full, assert_same_tokens, assert_tokens_are
from tests.engine.margins import draw_clear_choices
from tests.model.test_anyres_parity import rows_of_transformers, save_anyres

NUM_LAYERS, VOCAB_ROOM = 3, 100
GREEDY = SamplingParams(temperature=0, max_tokens=8, logprobs=-1, ignore_eos=True)
SPECS = [
    "none",
    "fastv:k=1,ratio=0.5",
    "fastv:k=2,ratio=0.9",
    "fastv:k=2,ratio=1",
    "pyramiddrop:layers=1-2,ratios=0.5-0.2",
    "random:layer=0,keep=0.3",
    "random:layer=2,keep=0.6,positions=keep",
    "pool:kernel=2x2,layer=0",
    "pool:kernel=2x2,layer=1",
    "pool:kernel=2x3,layer=1,function=max+pool:kernel=2x1,layer=2",
    "pool:kernel=8x1,layer=2",
    "divprune:keep=0.2",
    "divprune:keep=0.5+pyramiddrop:layers=1-2,ratios=0.7-0.3",
    "pool:kernel=1x2,layer=0+fastv:k=2,ratio=0.4",
]
SIZES = [(300, 200), (90, 500), (56, 56), (230, 231)]


def size_for(spec: str, number: int) -> tuple[int, int]:
    """Of a picture. DivPrune compares all rows once for each row that it keeps: of many rows two nearly always tie.

    Of a picture in one tile each row of the overview ties with the tile's.
    """
    return (112, 40) if "divprune" in spec else SIZES[number % len(SIZES)]


@pytest.fixture(scope="module", params=["next-mistral", "onevision"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp(request.param)
    model = save_anyres(path / "checkpoint", request.param)
    build_engine(path / "checkpoint", path / "engine", dtype="float32")
    return path / "engine", model


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(torch.initial_seed())


def eager(engine: Path) -> EagerDpn:
    """The decoder alone."""
    opened = EngineDir.open(engine)
    model = dataclasses.replace(opened.model, vision=None, projector=None)
    weights = (
        (name, tensor)
        for name, tensor in opened.load_weights().items()
        if not name.startswith(("vision.", "projector."))
    )
    return EagerDpn.from_weights(model, weights)


def prompt(generator: np.random.Generator, spec: str, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    ids = generator.integers(3, VOCAB_ROOM, 4).tolist()
    for _ in sizes:
        ids += [-200, *generator.integers(3, VOCAB_ROOM, 3).tolist()]
    images = [picture(generator, size) for size in sizes]
    return {"prompt_token_ids": ids, "reduce": spec, "multi_modal_data": {"image": images}}


def picture(generator: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Some coloured patches."""
    patches = generator.integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)


def drawn(generator: np.random.Generator, llm: LLM, spec: str, sizes: list[tuple[int, int]]) -> Any:
    return draw_clear_choices(
        partial(prompt, generator, spec, sizes), lambda asked: llm.generate(asked, GREEDY, use_tqdm=False)[0]
    )


def newlines(llm: LLM, asked: dict[str, Any]) -> Iterator[tuple[Any, list[int]]]:
    """Of each image its grids and newline rows, with all its rows."""
    for image in llm.processor.process({**asked, "reduce": "none"}).images:
        yield image.segments, image.newline_rows(None).tolist()


@pytest.mark.parametrize("spec", SPECS)
def test_as_the_eager_reference(saved: tuple[Path, Any], generator: np.random.Generator, spec: str) -> None:
    engine, model = saved
    llm, reference = LLM(engine, reduce=spec), eager(engine)
    size = size_for(spec, int(generator.integers(len(SIZES))))
    asked, output = drawn(generator, llm, spec, [size])
    ((segments, lines),) = newlines(llm, asked)
    (rows,) = rows_of_transformers(engine, model, asked["multi_modal_data"]["image"])
    expected = EagerReduced(reference, parse_spec(spec, NUM_LAYERS)).generate(
        asked["prompt_token_ids"], rows, image_segments=segments, newline_rows=lines, max_new_tokens=8
    )
    assert output.pyramid.kept == expected.kept
    assert set(output.pyramid.kv_lengths) == set(expected.kv_lengths)
    assert_tokens_are(output, expected.token_ids, expected.logits.log_softmax(-1))
    assert len(lines) > 0 and output.pyramid.image_segments == list(segments)
    num_text = len(asked["prompt_token_ids"]) - 1 + len(lines)
    assert [length - num_text for length in output.pyramid.kv_lengths] == output.pyramid.visual_tokens


@pytest.mark.parametrize(
    "options",
    [{}, {"max_chunk_tokens": 23}, {"reuse_bytes": 2**22, "block_size": 4}, {"max_num_batched_tokens": 1100}],
    ids=["whole", "chunked", "reuse", "small batches"],
)
def test_batch_equals_alone(saved: tuple[Path, Any], generator: np.random.Generator, options: dict[str, Any]) -> None:
    engine, _ = saved
    made: list[tuple[dict[str, Any], RequestOutput]] = []
    for number, spec in enumerate(SPECS):
        sizes = [size_for(spec, number), *([size_for(spec, number + 1)] if number % 3 == 0 else [])]
        made.append(drawn(generator, LLM(engine, reduce=spec), spec, sizes))
    llm = LLM(engine, reduce=SPECS, **options)
    for _ in range(2):
        order = generator.permutation(len(made))
        outputs = llm.generate([made[i][0] for i in order], GREEDY, use_tqdm=False)
        for index, output in zip(order, outputs, strict=True):
            expected = made[index][1]
            assert output.error is None and output.pyramid.kept == expected.pyramid.kept
            assert_same_tokens(output, expected)
    assert_pool_is_full(llm)


def test_forced_rows_give_the_same(saved: tuple[Path, Any], generator: np.random.Generator) -> None:
    engine, _ = saved
    llm = LLM(engine, reduce=SPECS)
    for spec in SPECS[1:]:
        asked, output = drawn(generator, llm, spec, [size_for(spec, 0)])
        again = llm.generate({**asked, "kept": output.pyramid.kept}, GREEDY, use_tqdm=False)[0]
        assert again.pyramid.kept == output.pyramid.kept
        assert_same_tokens(again, output)
    total = num_visual(tuple(output.pyramid.image_segments))
    bad = {**prompt(generator, SPECS[1], [(300, 200)]), "kept": [[*range(total // 2 - 1), total]]}
    with pytest.raises(RequestError, match=f"row {total}, expected some of the {total}"):
        llm.processor.process(bad)
