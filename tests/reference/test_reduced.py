"""The eager model with training-free reduction against the published codes, and the runtime against it."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import LLM
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.model.reduction.spec import parse_spec
from dpn_rt.outputs import RequestOutput
from dpn_rt.reference import EagerDpn
from dpn_rt.reference.reduced import EagerReduced
from tests.engine.answers import GREEDY, assert_tokens_are
from tests.engine.margins import draw_clear_choices
from tests.engine.models import MODEL, random_weights, with_decoder, write_random_engine
from tests.reducer_cases import CASES, ReducerCase

SPECS = (
    "fastv:k=2,ratio=0.5",
    "fastv:k=5,ratio=0.8",
    "pyramiddrop:layers=2-4-6,ratios=0.6-0.3-0.1",
    "random:layer=3,keep=0.4,seed=5,positions=keep",
    "pool:kernel=2x2,layer=2,function=max",
    "pool:kernel=1x2,layer=0+fastv:k=3,ratio=0.3",
    "divprune:keep=0.3+pyramiddrop:layers=4,ratios=0.5",
    "fastv:k=1,ratio=0.5+pyramiddrop:layers=3-5,ratios=0.5-0.2",
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_published(case: ReducerCase) -> None:
    model = EagerDpn.from_weights(case.config, case.canonical_weights().items())
    reduced = EagerReduced(model, parse_spec(case.spec, case.meta["layers"]))
    forced = case.kept if case.meta["method"]["name"] == "random" else None
    embeds = case.tensor("image_features") if case.has_image else None
    ids = case.arrays["input_ids"].tolist()
    output = reduced.generate(ids, embeds, image_grid=tuple(case.meta["grid"]), kept=forced, max_new_tokens=7)
    assert output.kept == (case.kept or [None] * len(output.kept))
    assert output.token_ids == case.generated_ids
    assert list(output.kv_lengths) == case.arrays["cache_len_prefill"].tolist()
    torch.testing.assert_close(output.logits, case.logits, atol=1e-4, rtol=0)


def models() -> dict[str, ModelConfig]:
    dense = dataclasses.replace(MODEL, reduction=NoReduction(), vision=None, projector=None)
    return {
        "grouped": dense,
        "one kv head": with_decoder(dense, num_kv_heads=1),
        "tied, biases": with_decoder(dense, num_kv_heads=4, tie_word_embeddings=True, qkv_bias=True, o_bias=True),
        "windows": with_decoder(dense, windows=(None, 12, 30, 12, None, 5, 20)),
        "windows of one row": with_decoder(dense, windows=(None, *[1] * 5, None)),
        "windows and normed heads": with_decoder(dense, windows=(12, 40, 12, 40, 12, 40, 12), qk_norm=True),
    }


@pytest.mark.parametrize("name", models())
def test_the_runtime_gives_the_same(name: str, tmp_path: Path) -> None:
    seed = torch.initial_seed()
    generator = np.random.default_rng(seed)
    config = models()[name]
    llm = LLM(write_random_engine(tmp_path / "engine", config, seed), reduce=["none", *SPECS])
    model = EagerDpn.from_weights(config, random_weights(config, seed))

    def draw(spec: str) -> dict[str, Any]:
        grid = tuple(generator.integers(1, 9, 2).tolist())
        before, after = (generator.integers(3, 99, n).tolist() for n in generator.integers(1, 20, 2))
        embeds = torch.from_numpy(generator.standard_normal((grid[0] * grid[1], 64)).astype(np.float32))
        media = {"image_embeds": embeds, "image_grid": grid}
        return {"prompt_token_ids": [*before, -200, *after], "multi_modal_data": media, "reduce": spec}

    def alone(prompt: dict[str, Any]) -> RequestOutput:
        return llm.generate(prompt, GREEDY, use_tqdm=False)[0]

    prompts = [draw_clear_choices(partial(draw, spec), alone)[0] for spec in SPECS]
    for prompt, output in zip(prompts, llm.generate(prompts, GREEDY, use_tqdm=False), strict=True):
        media = prompt["multi_modal_data"]
        expected = EagerReduced(model, parse_spec(prompt["reduce"], 7)).generate(
            prompt["prompt_token_ids"], media["image_embeds"], image_grid=media["image_grid"], max_new_tokens=24
        )
        assert expected.kept == output.pyramid.kept, prompt["reduce"]
        assert_tokens_are(output, expected.token_ids, expected.logits.log_softmax(-1))
