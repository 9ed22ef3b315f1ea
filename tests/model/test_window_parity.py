"""Decoders with sliding windows against transformers' own model: long prompts, batches, chunks and reused prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from dpn_rt import LLM, SamplingParams
from dpn_rt.builders.native import build_engine
from dpn_rt.outputs import RequestOutput
from dpn_rt.reference import EagerDpn
from tests.engine.answers import assert_same_tokens, assert_tokens_are
from tests.engine.test_prefix_cache import caches
from tests.model.llava_checkpoints import save_checkpoint

NUM_TOKENS = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=-1, ignore_eos=True)
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
ON_REQUEST = {"use_sliding_window": True}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 1}),
    ("mistral", {"sliding_window": 24}),
    ("mistral", {"sliding_window": 100, "head_dim": 32}),
    ("mistral", {"sliding_window": 101}),
    ("qwen2", {**ON_REQUEST, "sliding_window": 24, "max_window_layers": 1}),
    ("qwen3", {**ON_REQUEST, "sliding_window": 33, "layer_types": ALTERNATING, "head_dim": 32}),
]
Prompt = dict[str, Any]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]['sliding_window']}")
def built(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, LlavaForConditionalGeneration]:
    """An engine, and transformers' model of the checkpoint that it was built from."""
    family, text = request.param
    model = save_checkpoint(tmp_path / "c", tied=False, kv_heads=2, old_names=False, family=family, **text)
    build_engine(tmp_path / "c", tmp_path / "engine", dtype="float32")
    return tmp_path / "engine", model


def prompts(model: LlavaForConditionalGeneration) -> list[Prompt]:
    """Of 100 rows, with and without an image in the middle, and two that begin alike."""
    random = np.random.default_rng(torch.initial_seed())
    words = sorted(set(range(3, 90)) - {model.config.image_token_id})
    first, second = random.choice(words, (2, 100)).tolist()
    embeds = torch.from_numpy(random.standard_normal((16, 64)).astype(np.float32))
    image = {"multi_modal_data": {"image_embeds": embeds, "image_grid": (4, 4)}}
    return [
        {"prompt_token_ids": first},
        {"prompt_token_ids": [*first[:40], -200, *second[:44]], **image},
        {"prompt_token_ids": [*first[:40], -200, *second[44:50]], **image},
        {"prompt_token_ids": second[:9]},
        {"prompt_token_ids": [*first[:70], *second[:3]]},
    ]


def embeds_of(model: LlavaForConditionalGeneration, prompt: Prompt) -> torch.Tensor:
    """`[num_rows, hidden_size]` rows that transformers' decoder gets."""
    table = model.get_input_embeddings()
    parts = [
        prompt["multi_modal_data"]["image_embeds"] if token == -200 else table(torch.tensor([token]))
        for token in prompt["prompt_token_ids"]
    ]
    return torch.cat(parts)


@torch.inference_mode()
def check(model: LlavaForConditionalGeneration, prompt: Prompt, output: RequestOutput) -> None:
    """Every token and log-probability is that of a forward pass of transformers' model over all rows."""
    token_ids = output.outputs[0].token_ids
    assert len(token_ids) == NUM_TOKENS
    generated = model.get_input_embeddings()(torch.tensor(token_ids))
    rows = torch.cat([embeds_of(model, prompt), generated])[None]
    logits = model(inputs_embeds=rows, use_cache=False).logits[0, -NUM_TOKENS - 1 : -1]
    assert_tokens_are(output, list(token_ids), logits.log_softmax(-1))
    greedy = logits.max(-1).values - logits.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    assert greedy.max() < 2e-4, "the most probable tokens, or as probable ones within the error of float32"


@pytest.mark.parametrize(
    "options",
    [{}, {"max_chunk_tokens": 7}, {"reuse_bytes": 2**24, "block_size": 4}, {"max_num_seqs": 2, "block_size": 8}],
    ids=["whole", "chunked", "reuse", "few slots"],
)
def test_tokens_of_transformers(built: tuple[Path, LlavaForConditionalGeneration], options: dict[str, Any]) -> None:
    path, model = built
    llm, asked = LLM(path, **options), prompts(model)
    for _ in range(2):  # the second time prefixes are found in the cache, where they are kept
        for prompt, output in zip(asked, llm.generate(asked, GREEDY, use_tqdm=False), strict=True):
            check(model, prompt, output)
    if "reuse_bytes" in options:
        assert caches(llm)[0].statistics.hit_rows > 100


def test_a_batch_gives_each_prompt_what_it_gets_alone(built: tuple[Path, LlavaForConditionalGeneration]) -> None:
    path, model = built
    llm, asked = LLM(path), prompts(model)
    for prompt, together in zip(asked, llm.generate(asked, GREEDY, use_tqdm=False), strict=True):
        alone = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
        assert_same_tokens(together, alone)


def test_a_shorter_engine_without_windows_answers_the_same(built: tuple[Path, LlavaForConditionalGeneration]) -> None:
    """Where no sequence is longer than the windows, they are left out."""
    path, model = built
    window = next(filter(None, LLM(path).model.decoder.windows))
    asked = [{"prompt_token_ids": prompts(model)[0]["prompt_token_ids"][:count]} for count in (1, window - NUM_TOKENS)]
    if window <= NUM_TOKENS:
        return
    llm = LLM(path, max_model_len=window)
    assert llm.engine.runner.backend.executor.pool.positions is None
    for prompt, output in zip(asked, llm.generate(asked, GREEDY, use_tqdm=False), strict=True):
        check(model, prompt, output)


@torch.inference_mode()
def test_the_eager_model_follows_transformers(built: tuple[Path, LlavaForConditionalGeneration]) -> None:
    path, model = built
    eager = EagerDpn.from_engine(path)
    for prompt in prompts(model):
        embeds = prompt.get("multi_modal_data", {}).get("image_embeds")
        found = eager.generate(
            prompt["prompt_token_ids"], image_embeds=embeds, max_new_tokens=NUM_TOKENS, ignore_eos=True
        )
        generated = model.get_input_embeddings()(torch.tensor(found.token_ids))
        rows = torch.cat([embeds_of(model, prompt), generated])[None]
        expected = model(inputs_embeds=rows, use_cache=False).logits[0, -NUM_TOKENS - 1 : -1]
        torch.testing.assert_close(found.logits, expected, atol=1e-4, rtol=1e-4)
