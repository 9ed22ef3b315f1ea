"""How answers are compared with those of the published code."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dpn_rt import SamplingParams
from dpn_rt.reference import EagerDpn
from tests.golden_cases import NUM_GENERATED, GoldenCase

LOGPROB_TOLERANCE = 1e-4
PROB_TOLERANCE = 1e-5
PARAMS = SamplingParams(max_tokens=NUM_GENERATED, temperature=0.0, logprobs=-1, ignore_eos=True)


@dataclasses.dataclass(frozen=True)
class Expected:
    """The expected output of a request."""

    token_ids: Sequence[int]
    logprobs: torch.Tensor
    """[7, vocab_size]"""
    experts: Sequence[int | None]
    probs: Sequence[Sequence[float] | None]
    visual_tokens: Sequence[int]
    kv_lengths: Sequence[int]
    """After prefill."""


def of_golden(case: GoldenCase) -> Expected:
    return Expected(case.generated_ids, case.logprobs, case.experts, case.probs, case.visual_tokens, case.kv_lengths)


def of_eager(model: EagerDpn, case: GoldenCase, route: Sequence[int] | None = None) -> Expected:
    """The eager model's output for the prompt of `case`, which may be made for another model."""
    output = model.generate(
        case.prompt_token_ids,
        image_embeds=case.image_embeds,
        max_new_tokens=NUM_GENERATED,
        ignore_eos=True,
        route=route,
    )
    trace = output.trace
    logprobs = torch.log_softmax(output.logits.double(), dim=-1)
    return Expected(output.token_ids, logprobs, trace.experts, trace.probs, trace.visual_tokens, trace.kv_lengths)


def assert_gives(output: Any, expected: Expected, what: str) -> None:
    """Compare one request's output with the expected one; the error names the first difference."""
    completion, pyramid = output.outputs[0], output.pyramid
    assert list(pyramid.experts) == list(expected.experts), what
    assert list(pyramid.visual_tokens) == list(expected.visual_tokens), what
    assert list(pyramid.kv_lengths) == list(expected.kv_lengths), what
    assert len(pyramid.probs) == len(expected.probs), what
    for boundary, (probs, wanted) in enumerate(zip(pyramid.probs, expected.probs, strict=True)):
        assert (probs is None) == (wanted is None), f"{what}: probs of boundary {boundary}"
        if probs is not None and wanted is not None:
            assert list(probs) == pytest.approx(list(wanted), abs=PROB_TOLERANCE), f"{what}: boundary {boundary}"
    assert list(completion.token_ids) == list(expected.token_ids), what
    vocab_size = expected.logprobs.shape[1]
    assert all(len(position) == vocab_size for position in completion.logprobs), what
    actual = torch.tensor(
        [[position[token].logprob for token in range(vocab_size)] for position in completion.logprobs],
        dtype=torch.float64,
    )
    error = (actual - expected.logprobs).abs()
    assert torch.isfinite(error).all(), what
    step, token = (int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert error[step, token] <= LOGPROB_TOLERANCE, (
        f"{what}: log-probability of token {token} at step {step}: {actual[step, token]:.6f}, "
        f"expected {expected.logprobs[step, token]:.6f}"
    )
