"""Training-free reducers against the published codes' own numbers: kept rows, KV lengths, logits, greedy ids."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.format.engine_dir import EngineSource, write_engine
from dpn_rt.format.weight_spec import weight_spec
from dpn_rt.model.reduction.chain import Chain
from dpn_rt.model.reduction.spec import parse_spec
from dpn_rt.model.reduction.step import Cut
from dpn_rt.outputs import RequestOutput
from dpn_rt.reference import EagerDpn
from dpn_rt.reference.reduced import EagerReduced
from tests.reducer_cases import CASES, ReducerCase

PARAMS = SamplingParams(max_tokens=7, temperature=0.0, logprobs=-1, ignore_eos=True)
TOLERANCE = 1e-4

golden = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def load(case: ReducerCase, path: Path, *specs: str, **options: Any) -> LLM:
    """An engine of the case's stock model, with these reductions."""
    if not path.exists():
        weights = case.canonical_weights()
        ordered = [(name, weights[name]) for name in weight_spec(case.config)]
        write_engine(path, case.config, lambda: EngineSource("0" * 64, "original"), ordered, {})
    return LLM(path, reduce=list(specs) or case.spec, **options)


def forced(case: ReducerCase) -> dict[str, Any]:
    """Rows that are given beforehand: those that the published code drew by a generator of its own."""
    return {"kept": case.kept} if case.meta["method"]["name"] == "random" else {}


def assert_as_published(output: RequestOutput, case: ReducerCase) -> None:
    """All numbers of a request's first boundaries and of seven tokens."""
    completion, pyramid = output.outputs[0], output.pyramid
    wanted = case.kept or [None] * len(pyramid.kept)
    assert pyramid.kept == wanted
    assert list(completion.token_ids) == case.generated_ids
    actual = torch.tensor(
        [[position[token].logprob for token in range(case.meta["vocab"])] for position in completion.logprobs or ()],
        dtype=torch.float64,
    )
    torch.testing.assert_close(actual, case.logprobs, atol=TOLERANCE, rtol=0)


@golden
def test_generate_equals_the_published_code(case: ReducerCase, tmp_path: Path) -> None:
    llm = load(case, tmp_path / "engine")
    output = llm.generate(case.prompt(**forced(case)), PARAMS, use_tqdm=False)[0]
    assert_as_published(output, case)
    lengths = case.arrays["cache_len_prefill"].tolist()
    stages = llm.model.stage_layers
    assert output.pyramid.kv_lengths == [lengths[layers.start] for layers in stages]
    assert [lengths[layers.stop - 1] for layers in stages] == output.pyramid.kv_lengths


@golden
@pytest.mark.parametrize("options", [{"max_chunk_tokens": 7}, {"reuse_bytes": 2**24}], ids=["chunked", "reuse"])
def test_chunked_and_with_cached_prefixes(case: ReducerCase, tmp_path: Path, options: dict[str, Any]) -> None:
    llm = load(case, tmp_path / "engine", **options)
    for _ in range(3):
        assert_as_published(llm.generate(case.prompt(**forced(case)), PARAMS, use_tqdm=False)[0], case)


OTHERS = (
    "none",
    "fastv:k=2,ratio=0.3",
    "pyramiddrop:layers=1-3,ratios=0.4-0.2",
    "random:layer=1,keep=0.3",
    "divprune:keep=0.4",
)


@golden
def test_among_other_requests(case: ReducerCase, tmp_path: Path) -> None:
    """In any order among other reducers and text."""
    llm = load(case, tmp_path / "engine", case.spec, *OTHERS)
    generator = np.random.default_rng(torch.initial_seed())
    text = {"prompt_token_ids": generator.integers(3, case.meta["vocab"], 9).tolist()}
    others = [{**case.prompt(), "reduce": spec} for spec in OTHERS]
    asked = [case.prompt(**forced(case)), text, *others]
    order = generator.permutation(len(asked))
    outputs = llm.generate([asked[i] for i in order], PARAMS, use_tqdm=False)
    assert_as_published(outputs[order.tolist().index(0)], case)


@golden
def test_preempted(case: ReducerCase, tmp_path: Path) -> None:
    """Of two, the later one gives its rows back while it decodes, and keeps the same ones when it runs again."""
    decoder, decoded = case.config.decoder, 3
    rows = 2 * (sum(case.arrays["cache_len_prefill"].tolist()) + decoded * decoder.num_layers)
    row_bytes = 2 * 4 * decoder.num_kv_heads * decoder.head_dim
    llm = load(case, tmp_path / "engine", block_size=1, kv_cache_bytes=rows * row_bytes, reuse_bytes=0)
    for output in llm.generate([case.prompt(**forced(case))] * 2, PARAMS, use_tqdm=False):
        assert_as_published(output, case)
    assert llm.engine.num_preemptions > 0


RANKED = [case for case in CASES if case.meta["method"]["name"] in ("fastv", "pdrop") and case.has_image]


class Scored(EagerReduced):
    """Also notes what ranks the rows at each boundary."""

    def __init__(self, model: EagerDpn, chain: Chain) -> None:
        super().__init__(model, chain)
        self.scores: list[torch.Tensor] = []

    def _reduce(self, cut: Cut, first: Any, before: Any, rows: Any, forced: Any) -> Any:
        layer, entering = (cut.layer, before) if cut.step.scores == "here" else (cut.layer + 1, rows)
        self.scores.append(self._scores(layer, entering)[rows.visual])
        return super()._reduce(cut, first, before, rows, forced)


@pytest.mark.parametrize("case", RANKED, ids=lambda case: case.name)
def test_bfloat16_keeps_the_same_rows(case: ReducerCase, tmp_path: Path) -> None:
    """But for rows whose scores differ by less than bfloat16 changes them, measured on plain PyTorch in both dtypes.

    All three take the same rows into a boundary: those that the runtime kept before.
    """
    config = dataclasses.replace(case.config, dtype="bfloat16")
    weights = {name: tensor.bfloat16() for name, tensor in case.canonical_weights().items()}
    ordered = [(name, weights[name]) for name in weight_spec(config)]
    path = tmp_path / "engine"
    write_engine(path, config, lambda: EngineSource("0" * 64, "original"), ordered, {})
    prompt = case.prompt()
    kept = LLM(path, reduce=case.spec).generate(prompt, PARAMS, use_tqdm=False)[0].pyramid.kept
    chain, scores = parse_spec(case.spec, case.meta["layers"]), []
    for model_config, dtype in ((case.config, torch.float32), (config, torch.bfloat16)):
        model = EagerDpn.from_weights(model_config, ((name, each.to(dtype)) for name, each in weights.items()))
        scored = Scored(model, chain)
        embeds = case.tensor("image_features").bfloat16().to(dtype)
        scored.generate(
            prompt["prompt_token_ids"], embeds, image_grid=tuple(case.meta["grid"]), kept=kept, max_new_tokens=1
        )
        scores.append(scored.scores)
    left = np.arange(len(case.tensor("image_features")))
    for rows, exact, rounded in zip(kept, *scores, strict=True):
        stays = torch.from_numpy(np.isin(left, rows))
        assert stays.sum() == len(rows)
        error = float((exact - rounded).abs().max())
        if stays.any() and not stays.all():
            assert exact[stays].min() > exact[~stays].max() - 2 * error
        left = left[stays.numpy()]
