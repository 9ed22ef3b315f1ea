"""The batched sampler against a plain float64 reference, and properties that hold in any batch."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_rt.sampling import filters, sampler
from dpn_rt.sampling.filters import apply_min_p, apply_top_k_top_p, draw, stream_key, uniforms
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.sampling.sampler import SampledTokens, Sampler, SamplingState, draw_without_sorting, sampled_tokens
from tests.sampling import reference
from tests.skips import NO_GPU

VOCAB_SIZE = 50
EOS = (2,)
GPU_MARKS = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU_MARKS)]


def state(
    params: SamplingParams, prompt: list[int] | None = None, output: list[int] | None = None, **options: Any
) -> SamplingState:
    result = SamplingState(params, np.array(prompt or [], dtype=np.int64), VOCAB_SIZE, EOS, **options)
    for token_id in output or []:
        result.append(token_id)
    return result


def random_logits(
    rows: int, seed: int | None = None, dtype: torch.dtype = torch.float32, vocab_size: int = VOCAB_SIZE
) -> torch.Tensor:
    """Others at every call, or by the seed of a Hypothesis example."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab_size, generator=generator) * 3).to(dtype)


def shifted(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.amax(dim=1, keepdim=True)


def filtered(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    size = logits.shape[1]
    logits = shifted(logits) / torch.tensor([[p.temperature] for p in params])
    logits = apply_min_p(logits, torch.tensor([[p.min_p] for p in params], dtype=torch.float32))
    top_k = [min(p.top_k, size) if p.top_k > 0 else size for p in params]
    top_p = torch.tensor([[p.top_p] for p in params], dtype=torch.float64)
    return apply_top_k_top_p(logits, torch.tensor(top_k)[:, None], top_p, max(top_k))


RANDOM_PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.2, 3),
    top_k=st.one_of(st.just(0), st.integers(1, 60)),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 0.5)),
)


@settings(max_examples=150, deadline=None)
@given(params=st.lists(RANDOM_PARAMS, min_size=1, max_size=5), seed=st.integers(0, 10_000), coarse=st.booleans())
def test_the_filtered_distribution_is_the_references(params: list[SamplingParams], seed: int, coarse: bool) -> None:
    # bfloat16 logits rounded to quarters have ties at every border.
    logits = random_logits(len(params), seed)
    logits = (logits * 4).round() / 4 if coarse else logits
    actual = filtered(logits, params).double().softmax(dim=1)
    for row, p in enumerate(params):
        expected = torch.tensor(reference.distribution(logits[row].tolist(), p), dtype=torch.float64)
        kept, expected_kept = actual[row] > 0, expected > 0
        if not torch.equal(kept, expected_kept):
            # Where float32 rounding decides a border, one token more or less is kept; its probability is tiny.
            assert _is_on_border(logits[row], p, int(kept.sum()), int(expected_kept.sum())), (row, p)
            continue
        torch.testing.assert_close(actual[row], expected, atol=1e-5, rtol=1e-4)


def _is_on_border(logits: torch.Tensor, params: SamplingParams, count: int, expected: int) -> bool:
    weights = (shifted(logits[None])[0].double() / params.temperature).exp().sort(descending=True).values
    low, high = sorted((count, expected))
    at_min_p = abs(float(weights[low]) - params.min_p) < 1e-5
    ratios = weights.cumsum(0) / weights.cumsum(0)[:, None]
    return high - low <= 3 and (at_min_p or bool(((ratios[:, low - 1] - params.top_p).abs() < 1e-5).any()))


@pytest.mark.parametrize("top_k", [1, 3, 49, 50, 500])
def test_top_k_keeps_exactly_k_also_among_ties(top_k: int) -> None:
    logits = torch.cat([torch.zeros(1, VOCAB_SIZE), random_logits(1).round()])
    kept = filtered(logits, [SamplingParams(top_k=top_k)] * 2).isfinite().sum(dim=1)
    assert kept.tolist() == [min(top_k, VOCAB_SIZE)] * 2


@settings(max_examples=60, deadline=None)
@given(params=st.lists(RANDOM_PARAMS, min_size=1, max_size=4), seed=st.integers(0, 2**31), coarse=st.booleans())
def test_without_looking_at_results_the_same_tokens_are_kept(
    params: list[SamplingParams], seed: int, coarse: bool
) -> None:
    """Turns the shortcuts off, as on a GPU, where they would have to wait."""
    logits = random_logits(len(params), seed, torch.bfloat16 if coarse else torch.float32, vocab_size=400).float()
    expected = filtered(logits, params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "_can_look", lambda _: False)
        assert torch.equal(filtered(logits, params), expected)


@pytest.mark.parametrize("scale", [0.01, 0.5, 2.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_in_a_large_vocabulary(scale: float, top_p: float) -> None:
    """One batch of flat rows, which need every candidate, peaked rows, which need few, and a row without top-p."""
    size = 5000
    logits = torch.cat([random_logits(2, vocab_size=size) * scale, random_logits(1, vocab_size=size)])
    kept = filtered(logits, [SamplingParams(top_p=top_p)] * 2 + [SamplingParams()])
    assert int(kept[2].isfinite().sum()) == size
    for row in range(2):
        probs = logits[row].double().softmax(dim=0)
        inside = kept[row].isfinite()
        mass, least = float(probs[inside].sum()), float(probs[inside].min())
        assert mass >= top_p - 1e-6
        assert mass - least < top_p + 1e-6
        assert float(probs[~inside].max()) <= least


def test_a_row_is_filtered_alike_alone_and_beside_others() -> None:
    params = [
        SamplingParams(top_p=0.9, top_k=300),
        SamplingParams(top_p=0.95),
        SamplingParams(top_k=7),
        SamplingParams(min_p=0.02, top_p=0.5),
        SamplingParams(),
    ]
    logits = random_logits(len(params), vocab_size=4000).bfloat16().float()
    together = filtered(logits, params)
    for row, p in enumerate(params):
        alone = filtered(logits[row : row + 1], [p])[0]
        assert torch.equal(together[row], alone), f"row {row} differs at {(together[row] != alone).nonzero()[:3]}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_largest(dtype: torch.dtype, device: str) -> None:
    logits = random_logits(4).round().to(dtype).to(device)
    before = logits.clone()
    result = Sampler().sample(logits, [state(SamplingParams(temperature=0))] * 4)
    assert result.token_ids == [row.index(max(row)) for row in logits.tolist()]
    assert result.logprobs is None
    assert torch.equal(logits, before)


def test_penalties_match_the_reference() -> None:
    params = [
        SamplingParams(temperature=0, repetition_penalty=1.7),
        SamplingParams(temperature=0, presence_penalty=1.5, frequency_penalty=0.7),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, repetition_penalty=0.6, presence_penalty=-1, frequency_penalty=-0.5),
    ]
    generator = np.random.default_rng(torch.initial_seed())
    for _ in range(20):
        logits = random_logits(len(params))
        prompts = [[*generator.integers(0, VOCAB_SIZE, 12).tolist(), -200] for _ in params]
        outputs = [generator.integers(0, 12, 20).tolist() for _ in params]
        states = [state(*items) for items in zip(params, prompts, outputs, strict=True)]
        expected = []
        for row, p in enumerate(params):
            scores = reference.penalized(logits[row].tolist(), prompts[row], outputs[row], p)
            expected.append(scores.index(max(scores)))
        assert Sampler().sample(logits, states).token_ids == expected


def test_no_end_before_min_tokens() -> None:
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[:, 2] = 10  # end of sequence
    logits[:, 7] = 9  # stop token
    logits[:, 4] = 8
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[7])
    early, due = state(params, output=[4]), state(params, output=[4, 4])
    ignores = state(SamplingParams(temperature=0, min_tokens=2, ignore_eos=True))
    assert Sampler().sample(logits, [early, due, ignores]).token_ids == [4, 2, 2]


def _run(logits: torch.Tensor, states: list[SamplingState]) -> SampledTokens:
    result = Sampler().sample(logits, states)
    for item, token_id in zip(states, result.token_ids, strict=True):
        item.append(token_id)
    return result


def test_a_seeded_sequence_repeats_whatever_else_is_in_the_batch() -> None:
    params = SamplingParams(seed=11, temperature=1.3, top_p=0.97, frequency_penalty=0.3)
    steps = [random_logits(5) for _ in range(12)]
    alone = state(params)
    expected = [_run(logits[2:3], [alone]).token_ids[0] for logits in steps]
    assert len(set(expected)) > 3
    others = [SamplingParams(temperature=0), SamplingParams(top_k=3), SamplingParams(), SamplingParams(seed=12)]
    batch = [state(p) for p in others]
    batch.insert(2, state(params))
    actual = [_run(logits, batch).token_ids[2] for logits in steps]
    assert actual == expected
    # A preempted sequence keeps its state; a state that is rebuilt from the output continues in the same way.
    rebuilt = state(params, output=expected[:6])
    assert [_run(logits[2:3], [rebuilt]).token_ids[0] for logits in steps[6:]] == expected[6:]


@settings(max_examples=60, deadline=None)
@given(params=st.lists(RANDOM_PARAMS, min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_without_sorting_the_same_tokens_are_drawn(params: list[SamplingParams], seed: int) -> None:
    """The kernel of GPUs. It rounds sums differently, which changes a draw only near a step of the distribution."""
    logits = random_logits(len(params), seed)
    states = [state(dataclasses.replace(p, seed=seed), output=[3] * row) for row, p in enumerate(params)]
    assert torch.equal(draw_without_sorting(logits, states), sampler._draw_rows(logits, states))


@settings(max_examples=60, deadline=None)
@given(params=st.lists(RANDOM_PARAMS, min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_tokens_are_drawn_before_the_last_ones_are_known(params: list[SamplingParams], seed: int) -> None:
    logits = random_logits(len(params) + 1, seed)
    seeded = [SamplingParams(temperature=0), *(dataclasses.replace(p, seed=seed) for p in params)]
    unaware = [state(p, output=[3] * row) for row, p in enumerate(seeded)]
    aware = [state(p, output=[3] * (row + 1)) for row, p in enumerate(seeded)]
    assert all(each.can_run_ahead for each in unaware)
    expected = Sampler().sample(logits, aware)
    chosen = sampled_tokens(Sampler().choose(logits, unaware, num_unread=1).numpy())
    assert (chosen.token_ids, chosen.finite) == (expected.token_ids, expected.finite)


@pytest.mark.parametrize(
    "needs", [{"logprobs": 0}, {"min_tokens": 1}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}], ids=str
)
def test_what_needs_the_host_does_not_run_ahead(needs: dict[str, Any]) -> None:
    assert not state(SamplingParams(**needs)).can_run_ahead


def test_seeds_and_completions_differ() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    draws = {}
    for seed in range(3):
        for index in range(3):
            item = state(SamplingParams(seed=seed, n=3), index=index)
            draws[seed, index] = tuple(_run(logits, [item]).token_ids[0] for _ in range(10))
    assert len(set(draws.values())) == 9
    unseeded = [
        tuple(_run(logits, [item]).token_ids[0] for _ in range(10))
        for item in (state(SamplingParams()), state(SamplingParams()))
    ]
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=0),
        SamplingParams(seed=1, temperature=0.6, top_k=8),
        SamplingParams(seed=2, temperature=2.0, top_p=0.8),
        SamplingParams(seed=3, min_p=0.1),
    ],
)
def test_tokens_follow_the_distribution(params: SamplingParams) -> None:
    logits = random_logits(1) / 2
    expected = reference.distribution(logits[0].tolist(), params)
    item, count = state(params), 4000
    seen = Counter(_run(logits, [item]).token_ids[0] for _ in range(count))
    # Chi-squared over the tokens that should come at least five times. More than this bound (Laurent and Massart, 2000)
    # has a probability below exp(-20) = 2e-9; a normal distribution's six deviations are passed in one of 10^4 draws.
    cells = [(seen[i], probability * count) for i, probability in enumerate(expected) if probability * count >= 5]
    chi_squared = sum((observed - mean) ** 2 / mean for observed, mean in cells)
    assert chi_squared < len(cells) + 2 * math.sqrt(20 * len(cells)) + 2 * 20, chi_squared
    assert all(expected[token_id] > 0 for token_id in seen)


def test_uniforms_are_uniform_and_independent() -> None:
    count = 20_000
    keys = np.full(count, stream_key(0, 0), dtype=np.uint64)
    values = uniforms(keys, np.arange(count, dtype=np.uint64))
    assert values.min() >= 0
    assert values.max() < 1
    histogram = np.histogram(values, bins=50, range=(0, 1))[0]
    assert abs(histogram - count / 50).max() < 6 * math.sqrt(count / 50)
    neighbours = np.array([stream_key(seed, 0) for seed in range(1000)], dtype=np.uint64)
    across = uniforms(neighbours, np.zeros(1000, dtype=np.uint64))
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(across[:-1], across[1:])[0, 1]) < 0.2


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_no_dropped_token_is_drawn_at_the_ends(uniform: float) -> None:
    logits = torch.full((1, VOCAB_SIZE), -torch.inf)
    logits[0, 5] = 0
    logits[0, 9] = -1e-3
    drawn = draw(logits, torch.tensor([uniform], dtype=torch.float64))
    assert drawn.tolist() == [5 if uniform == 0 else 9]


def test_a_tiny_temperature_does_not_overflow() -> None:
    logits = random_logits(1) * 100
    result = Sampler().sample(logits, [state(SamplingParams(temperature=2e-5, seed=0))])
    assert result.token_ids == [int(logits.argmax())]


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(seed=0, logprobs=3)])
def test_best_ids_that_are_known_are_not_sought(monkeypatch: pytest.MonkeyPatch, params: SamplingParams) -> None:
    logits = random_logits(3)
    logits[1, 3] = torch.nan
    expected = Sampler().sample(logits, [state(params) for _ in range(3)])
    best = filters.best_ids(logits)
    assert best[1] == filters.NO_SOFTMAX
    monkeypatch.setattr("dpn_rt.sampling.sampler.best_ids", None)
    result = Sampler().sample(logits, [state(params) for _ in range(3)], best)
    assert result.finite == expected.finite == [True, False, True]
    assert result.token_ids == expected.token_ids


def test_rows_without_a_softmax_are_told() -> None:
    logits = random_logits(4)
    logits[1, 3] = torch.nan
    logits[2] = -torch.inf
    logits[3, 4] = -torch.inf
    for params in (SamplingParams(temperature=0), SamplingParams(seed=0, top_p=0.9, top_k=5)):
        result = Sampler().sample(logits, [state(params) for _ in range(4)])
        assert result.finite == [True, False, False, True]
        assert all(0 <= token_id < VOCAB_SIZE for token_id in result.token_ids)
