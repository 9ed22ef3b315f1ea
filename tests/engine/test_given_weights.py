"""An engine of weights in memory, without a directory, answers as the one that was written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.errors import ConfigError, EngineError
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.settings import EngineOptions
from tests.engine.answers import all_logprobs
from tests.engine.models import MODEL, random_prompt, write_random_engine

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=-1)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_random_engine(tmp_path / "engine", MODEL)


@pytest.fixture
def weights(engine: Path) -> dict[str, torch.Tensor]:
    return EngineDir.open(engine).load_weights()


def test_it_answers_as_the_written_engine(engine: Path, weights: dict[str, torch.Tensor]) -> None:
    prompts = [random_prompt(np.random.default_rng(torch.initial_seed()), grid) for grid in ((8, 8), None)]
    expected = LLM(engine, device="cpu").generate(prompts, PARAMS, use_tqdm=False)
    llm = LLM.from_weights(MODEL, reversed(weights.items()), "cpu", EngineOptions(max_num_seqs=2))
    for actual, wanted in zip(llm.generate(prompts, PARAMS, use_tqdm=False), expected, strict=True):
        assert actual.outputs[0].token_ids == wanted.outputs[0].token_ids
        assert torch.equal(all_logprobs(actual), all_logprobs(wanted))


def test_weights_that_do_not_fit_are_named(weights: dict[str, torch.Tensor]) -> None:
    first, second, third, fourth, fifth, *_ = weights
    changed = {**weights, "other": torch.zeros(1), first: weights[first][:1], second: weights[second].double()}
    changed[fifth] = torch.stack([weights[fifth]] * 2, -1)[..., 0]
    del changed[third]
    with pytest.raises(EngineError) as caught:
        LLM.from_weights(MODEL, [*changed.items(), (fourth, weights[fourth])], "cpu")
    message = str(caught.value)
    for part in ("other is unexpected", f"{first}: expected", "got [1", "float64", f"{third} is missing"):
        assert part in message
    assert f"{fourth} is given twice" in message
    assert f"{fifth} has strides" in message


def test_what_only_a_directory_has_is_refused(weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size=2: expected 1"):
        LLM.from_weights(MODEL, weights.items(), "cpu", EngineOptions(tensor_parallel_size=2))
    with pytest.raises(ConfigError, match="device='tpu'"):
        LLM.from_weights(MODEL, weights.items(), "tpu")
    prompt = dataclasses.replace(MODEL.prompt, has_tokenizer=True)
    with pytest.raises(EngineError, match="processor files"):
        LLM.from_weights(dataclasses.replace(MODEL, prompt=prompt), weights.items(), "cpu")
