"""The runtime gives the published code's numbers: checkpoint directory -> engine -> `LLM.generate`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpn_rt import LLM
from dpn_rt.builders.native import build_engine
from dpn_rt.reference import EagerDpn
from tests.golden_answers import PARAMS, assert_gives, of_eager, of_golden
from tests.golden_cases import CASES, GoldenCase, case_named, prompts_for

golden = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def load(case: GoldenCase, directory: Path, **options: Any) -> LLM:
    build_engine(case.write_checkpoint(directory / "checkpoint"), directory / "engine")
    return LLM(directory / "engine", device="cpu", **options)


@golden
def test_generate_equals_the_published_code(case: GoldenCase, tmp_path: Path) -> None:
    output = load(case, tmp_path).generate(case.request(), PARAMS, use_tqdm=False)[0]
    assert_gives(output, of_golden(case), case.name)
    assert list(output.prompt_token_ids) == case.prompt_token_ids


# Each case has its own weights. So a batch of different prompts uses one case's model, and the eager model, which is
# checked against all golden data, computes the expected outputs of the other prompts.
BATCH_MODELS = ("c04_g24_r222", "c12_g5_r002", "c18_g12_lasttoken", "c19_g12_avg", "c21_g7_conv", "c23_g12_static22")


@pytest.fixture(params=BATCH_MODELS)
def served(request: pytest.FixtureRequest) -> Iterator[tuple[GoldenCase, EagerDpn]]:
    case = case_named(request.param)
    yield case, EagerDpn.from_weights(case.config, case.canonical_weights().items())


def test_a_shuffled_batch_gives_each_prompt_what_it_gets_alone(
    served: tuple[GoldenCase, EagerDpn], tmp_path: Path
) -> None:
    case, eager = served
    prompts = prompts_for(case)
    expected = {prompt.name: of_eager(eager, prompt) for prompt in prompts}
    llm = load(case, tmp_path)
    for seed in range(2):
        random.Random(seed).shuffle(prompts)
        outputs = llm.generate([prompt.request() for prompt in prompts], PARAMS, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            assert_gives(output, expected[prompt.name], f"{prompt.name} on the model of {case.name}, order {seed}")
            if prompt is case:
                assert_gives(output, of_golden(case), case.name)


def test_a_batch_in_a_small_pool_gives_the_same(tmp_path: Path) -> None:
    """With room for about two sequences and one prefill at a time, sequences wait, join late and may be preempted."""
    case = case_named("c08_g8_r201")
    eager = EagerDpn.from_weights(case.config, case.canonical_weights().items())
    prompts = prompts_for(case)
    row_bytes = case.meta["layers"] * 2 * case.meta["hidden"] * 4
    llm = load(case, tmp_path, kv_cache_bytes=1300 * row_bytes, max_num_batched_tokens=640, max_num_seqs=4)
    outputs = llm.generate([prompt.request() for prompt in prompts], PARAMS, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_gives(output, of_eager(eager, prompt), prompt.name)


def test_forced_routes_in_one_batch(tmp_path: Path) -> None:
    case = case_named("c01_g24_r012")
    eager = EagerDpn.from_weights(case.config, case.canonical_weights().items())
    routes = [[0, 0, 0], [2, 2, 2], [1, 0, 2], [2, 1, 1], None]
    requests = [case.request() | ({} if route is None else {"route": route}) for route in routes]
    outputs = load(case, tmp_path).generate(requests, PARAMS, use_tqdm=False)
    for route, output in zip(routes, outputs, strict=True):
        assert_gives(output, of_eager(eager, case, route), f"route {route}")
