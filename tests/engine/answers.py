"""How answers are compared: with those of another engine, or of another model, up to near ties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.outputs import RequestOutput
from dpn_rt.sampling.logprobs import Logprob, VocabularyLogprobs

GREEDY = SamplingParams(temperature=0, max_tokens=24, logprobs=-1, ignore_eos=True)


def all_logprobs(output: RequestOutput) -> torch.Tensor:
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    return torch.from_numpy(np.stack([whole_vocabulary(position) for position in logprobs]))


def whole_vocabulary(position: Mapping[int, Logprob]) -> np.ndarray[Any, np.dtype[np.float32]]:
    assert isinstance(position, VocabularyLogprobs)
    return position.values_array


def assert_same(actual: RequestOutput, expected: RequestOutput) -> None:
    assert actual.error is None
    assert actual.pyramid.experts == expected.pyramid.experts
    assert actual.pyramid.visual_tokens == expected.pyramid.visual_tokens
    assert actual.pyramid.kv_lengths == expected.pyramid.kv_lengths
    assert_same_tokens(actual, expected)


def assert_same_tokens(actual: RequestOutput, expected: RequestOutput) -> None:
    assert_tokens_are(actual, expected.outputs[0].token_ids, all_logprobs(expected))


def assert_tokens_are(actual: RequestOutput, wanted: list[int], wanted_logprobs: torch.Tensor) -> None:
    """With their log-probabilities, up to where `assert_ids_are` compares."""
    end = assert_ids_are(actual.outputs[0].token_ids, wanted, wanted_logprobs)
    torch.testing.assert_close(all_logprobs(actual)[: end + 1], wanted_logprobs[: end + 1], atol=1e-4, rtol=0)


def assert_ids_are(ids: list[int], wanted: list[int], wanted_logprobs: torch.Tensor) -> int:
    """Up to the first token where two are equally probable within the error of float32: there either is right.

    Returns its place, or the number of tokens.
    """
    assert len(ids) == len(wanted)
    end = next((i for i, pair in enumerate(zip(ids, wanted, strict=True)) if pair[0] != pair[1]), len(ids))
    if end < len(ids):
        margin = (wanted_logprobs[end, wanted[end]] - wanted_logprobs[end, ids[end]]).item()
        assert abs(margin) < 2e-4, f"token {end}: {ids[end]} for {wanted[end]}, which is {margin:.1e} more probable"
    return end


def assert_pool_is_full(llm: LLM) -> None:
    cache = llm.engine.runner.cache
    assert cache.num_free_blocks == cache.num_blocks
    assert cache.num_free_slots == cache.config.max_num_seqs
