"""Sliding windows and normed heads in an engine with routed stages, against the eager model."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from dpn_rt import LLM
from dpn_rt.format.config import ModelConfig
from dpn_rt.reference import EagerDpn
from tests.engine.answers import GREEDY, all_logprobs, assert_pool_is_full, assert_same_tokens, assert_tokens_are
from tests.engine.models import MODEL, kv_bytes, random_prompt, with_decoder, write_random_engine
from tests.places import Place

WINDOWS = (None, 20, 9, 20, 1, None, 33)
MODELS = {
    "windows": with_decoder(MODEL, windows=WINDOWS),
    "normed heads": with_decoder(MODEL, qk_norm=True),
    "both": with_decoder(MODEL, windows=(30,) * 7, qk_norm=True, num_kv_heads=1),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunked": {"max_chunk_tokens": 7},
    "reuse": {"reuse_bytes": 2**22},
    "small blocks": {"block_size": 3, "reuse_bytes": 2**22, "max_chunk_tokens": 11},
}


def prompts(count: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(torch.initial_seed())
    made = [random_prompt(random, [(8, 8), (5, 7), None][i % 3]) for i in range(count)]
    for prompt in made:
        prompt["route"] = random.integers(0, 3, 3).tolist()
    return made


@torch.inference_mode()
def forced_logits(eager: EagerDpn, prompt: dict[str, Any], token_ids: list[int]) -> torch.Tensor:
    """`[num_tokens, vocab_size]` before each of `token_ids`, which are decoded one after another."""
    media, cache = prompt.get("multi_modal_data", {}), DynamicCache()
    rows, layout = eager.embed(prompt["prompt_token_ids"], media.get("image_embeds"), media.get("image_grid"))
    logits = [eager.lm_head(eager.prefill(rows, layout, prompt["route"], cache)[0][-1])]
    return torch.stack(logits + [eager.decode(token, cache) for token in token_ids[:-1]])


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> ModelConfig:
    return MODELS[request.param]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tokens_of_the_eager_model(tmp_path: Path, model: ModelConfig, options: dict[str, Any]) -> None:
    llm, eager = LLM(write_random_engine(tmp_path / "e", model), **options), EagerDpn.from_engine(tmp_path / "e")
    asked = prompts(6)
    wanted = []
    for prompt in asked:
        embeds = prompt.get("multi_modal_data", {}).get("image_embeds")
        grid = prompt.get("multi_modal_data", {}).get("image_grid")
        wanted.append(
            eager.generate(
                prompt["prompt_token_ids"], image_embeds=embeds, image_grid=grid, route=prompt["route"],
                max_new_tokens=GREEDY.max_tokens, ignore_eos=True,
            )
        )  # fmt: skip
    for _ in range(2):
        for output, expected in zip(llm.generate(asked, GREEDY, use_tqdm=False), wanted, strict=True):
            assert_tokens_are(output, expected.token_ids, expected.logits.log_softmax(-1))
    assert_pool_is_full(llm)


def test_completions_of_one_prompt_share_blocks_with_their_positions(tmp_path: Path, model: ModelConfig) -> None:
    """A last block that is not full is copied for each completion, with the positions of its rows."""
    llm, eager = LLM(write_random_engine(tmp_path / "e", model), block_size=5), EagerDpn.from_engine(tmp_path / "e")
    several = dataclasses.replace(GREEDY, n=3, temperature=1.0, seed=4)
    for prompt in prompts(3):
        output = llm.generate(prompt, several, use_tqdm=False)[0]
        for completion in output.outputs:
            wanted = forced_logits(eager, prompt, completion.token_ids).log_softmax(-1)
            assert_tokens_are(dataclasses.replace(output, outputs=[completion]), completion.token_ids, wanted)
    assert_pool_is_full(llm)


def test_preempted_sequences_give_what_they_give_alone(tmp_path: Path, model: ModelConfig) -> None:
    path = write_random_engine(tmp_path / "e", model)
    few = LLM(path, kv_cache_bytes=kv_bytes(130, 4, model), block_size=4, max_num_seqs=4)
    alone, asked = partial(LLM(path).generate, sampling_params=GREEDY, use_tqdm=False), prompts(8)
    for output, prompt in zip(few.generate(asked, GREEDY, use_tqdm=False), asked, strict=True):
        assert_same_tokens(output, alone(prompt)[0])
    assert few.engine.num_preemptions > 0
    assert_pool_is_full(few)


def test_steps_on_a_device_give_what_the_host_gives(place: Place, tmp_path: Path, model: ModelConfig) -> None:
    """Stages that are prepared before the host knows their rows, and decode steps as graphs, padded to their sizes."""
    path = write_random_engine(tmp_path / "e", dataclasses.replace(model, dtype=place.dtype))
    asked, llm = prompts(7), place.load(path, max_num_seqs=6)
    for output, prompt in zip(llm.generate(asked, GREEDY, use_tqdm=False), asked, strict=True):
        expected = LLM(path, device="cpu").generate(prompt, GREEDY, use_tqdm=False)[0]
        if place.device is not None:
            assert_same_tokens(output, expected)
        torch.testing.assert_close(all_logprobs(output)[0], all_logprobs(expected)[0], atol=place.tolerance, rtol=0)
    assert_pool_is_full(llm)


def test_only_a_pool_of_a_model_with_windows_has_positions(tmp_path: Path, model: ModelConfig) -> None:
    llm = LLM(write_random_engine(tmp_path / "e", model))
    positions = llm.engine.runner.backend.executor.pool.positions
    assert (positions is None) == (not model.decoder.windows)
