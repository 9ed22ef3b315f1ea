"""Stage networks, boundaries, slots and scheduler together give the published code's numbers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dpn_rt import LLM
from dpn_rt.reference import EagerDpn
from tests.backends.tensorrt.engines import evaluated_llm, limits_of, write_plan_engine
from tests.golden_answers import PARAMS, assert_gives, of_eager, of_golden
from tests.golden_cases import CASES, GoldenCase, case_named, prompts_for
from tests.skips import NO_TENSORRT

pytest.importorskip("tensorrt_rtx_bindings", reason=NO_TENSORRT)


MAX_BATCH = 4


def load(case: GoldenCase, directory: Path, patch: pytest.MonkeyPatch) -> LLM:
    limits = limits_of(case.config, max_batch=MAX_BATCH)
    return evaluated_llm(write_plan_engine(directory / "engine", case.config, case.canonical_weights(), limits), patch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_generate_equals_the_published_code(case: GoldenCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = load(case, tmp_path, monkeypatch).generate(case.request(), PARAMS, use_tqdm=False)[0]
    assert_gives(output, of_golden(case), case.name)


@pytest.mark.parametrize("name", ["c04_g24_r222", "c12_g5_r002"])
def test_a_batch_of_routes_gives_each_prompt_what_it_gets_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text prompts, skipped samples and different routes in one padded batch, and more prompts than slots."""
    case = case_named(name)
    eager = EagerDpn.from_weights(case.config, case.canonical_weights().items())
    prompts = prompts_for(case)
    random.Random(name).shuffle(prompts)
    expected = [of_eager(eager, prompt) for prompt in prompts]
    assert len(prompts) > MAX_BATCH
    assert len({tuple(each.experts) for each in expected}) > 2
    outputs = load(case, tmp_path, monkeypatch).generate([p.request() for p in prompts], PARAMS, use_tqdm=False)
    for prompt, output, wanted in zip(prompts, outputs, expected, strict=True):
        assert_gives(output, wanted, f"{prompt.name} on the model of {case.name}")
