"""The whole runtime in bfloat16: its error against float32 is at most twice that of eager PyTorch in bfloat16."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.reference import EagerDpn
from tests.engine.models import MODEL, VOCAB_SIZE, random_prompt, write_random_engine

ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
ROUTE = [2, 0, 1]


def logprobs(llm: LLM, prompt: dict[str, object]) -> torch.Tensor:
    output = llm.generate({**prompt, "route": ROUTE}, ONE_TOKEN, use_tqdm=False)[0]
    entries = output.outputs[0].logprobs
    assert entries is not None
    return torch.tensor([entries[0][token].logprob for token in range(VOCAB_SIZE)])


@pytest.mark.parametrize("prepack", [False, True])
def test_bfloat16(tmp_path: Path, prepack: bool) -> None:
    low = dataclasses.replace(MODEL, dtype="bfloat16")
    # Both engines have the same weights, rounded to bfloat16, so only the arithmetic differs.
    write_random_engine(tmp_path / "low", low)
    llm = LLM(tmp_path / "low", prepack_weights=prepack)
    eager_low = EagerDpn.from_engine(tmp_path / "low")
    eager_high = EagerDpn.from_engine(tmp_path / "low", dtype=torch.float32)
    random = np.random.default_rng(torch.initial_seed())
    ours, theirs = [], []
    for _ in range(12):
        prompt = random_prompt(random, (8, 8))
        embeds = prompt["multi_modal_data"]["image_embeds"].bfloat16()
        ids = prompt["prompt_token_ids"]
        reference = eager_logprobs(eager_high, ids, embeds.float())
        ours.append((logprobs(llm, prompt) - reference).square().mean())
        theirs.append((eager_logprobs(eager_low, ids, embeds) - reference).square().mean())
    # Means over prompts: at this size the error of one prompt is too random.
    assert torch.stack(ours).mean().sqrt() <= 2 * torch.stack(theirs).mean().sqrt()


def eager_logprobs(model: EagerDpn, ids: list[int], embeds: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result = model.forward(ids, image_embeds=embeds, route=ROUTE)
    return result.logits[-1].float().log_softmax(-1)
