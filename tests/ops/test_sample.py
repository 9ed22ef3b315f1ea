from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from dpn_rt.sampling.filters import best_ids
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.sampling.sampler import Sampler, SamplingState
from tests.ops.conftest import random_rows
from tests.ops.sample_reference import Parameters, assert_drawn

NAN, INF = float("nan"), float("inf")


def parameters(num_rows: int = 1, **changes: float) -> Parameters:
    """Arguments for draws at temperature 1 without filters; `changes` replaces some of them for every row."""
    values = {"temperatures": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "keys": 7, "positions": 0} | changes
    dtypes = {"top_k": torch.int32, "top_p": torch.float64, "keys": torch.int64, "positions": torch.int64}
    tensors = {n: torch.full((num_rows,), v, dtype=dtypes.get(n, torch.float32)) for n, v in values.items()}
    return Parameters(**tensors)


def sample(logits: Tensor, drawn: Parameters) -> tuple[Tensor, Tensor]:
    return ops.sample(logits, *drawn.tensors())


def counts(logits: list[float], draws: int = 4000, **changes: float) -> list[int]:
    """How often each token is drawn."""
    drawn = dataclasses.replace(parameters(draws, **changes), positions=torch.arange(draws))
    tokens, _ = sample(torch.tensor([logits]).expand(draws, -1).contiguous(), drawn)
    return torch.bincount(tokens.long(), minlength=len(logits)).tolist()


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 1000, 1024, 9001])
@pytest.mark.parametrize("num_rows", [1, 40])
def test_sample(generator: torch.Generator, dtype: torch.dtype, num_rows: int, vocab_size: int) -> None:
    logits = random_rows(generator, (num_rows, vocab_size), dtype, 3.0)
    drawn = Parameters.random(generator, num_rows, vocab_size)
    tokens, is_finite = sample(logits, drawn)
    assert is_finite.tolist() == [1] * num_rows
    assert_drawn(tokens, logits, drawn)


def test_a_row_gets_in_a_batch_what_it_gets_alone(generator: torch.Generator, dtype: torch.dtype) -> None:
    logits, drawn = random_rows(generator, (9, 700), dtype, 2.0), Parameters.random(generator, 9, 700)
    tokens, _ = sample(logits, drawn)
    for row in range(9):
        alone, _ = ops.sample(logits[row : row + 1], *(value[row : row + 1] for value in drawn.tensors()))
        assert alone[0] == tokens[row]


def test_a_seed_gives_the_tokens_of_the_sampler() -> None:
    logits = torch.randn(6, 512, device="cpu") * 3
    values = [(1, 0, 1, 0), (0.7, 50, 1, 0), (1.3, 0, 0.8, 0), (1, 20, 0.9, 0.05), (0, 0, 1, 0), (2, 1, 1, 0)]
    settings = [SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, seed=11) for t, k, p, m in values]
    states = [SamplingState(p, torch.zeros(1).long().cpu().numpy(), 512, index=i) for i, p in enumerate(settings)]
    keys = torch.tensor([state.key - 2**64 if state.key >= 2**63 else state.key for state in states])
    for step in range(12):
        with torch.device("cpu"):
            wanted = Sampler().sample(logits, states).token_ids
        tokens, _ = sample(
            logits.to(keys.device),
            Parameters(
                torch.tensor([p.temperature for p in settings]),
                torch.tensor([p.top_k for p in settings], dtype=torch.int32),
                torch.tensor([p.top_p for p in settings], dtype=torch.float64),
                torch.tensor([p.min_p for p in settings]),
                keys,
                torch.full((6,), step),
            ),
        )
        assert tokens.tolist() == wanted, step
        for state, token in zip(states, wanted, strict=True):
            state.append(token)


def test_draws_are_distributed_as_the_softmax() -> None:
    drawn = counts([0.0, 1.0, 2.0, -INF])
    for count, share in zip(drawn, torch.tensor([0.0, 1.0, 2.0, -INF]).softmax(0).tolist(), strict=True):
        assert abs(count / 4000 - share) < 5 * (share * (1 - share) / 4000) ** 0.5 + 1e-9


@pytest.mark.parametrize(
    ("changes", "possible"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 2}, [0, 2]),  # of equal logits the first is kept
        ({"top_k": 3}, [0, 2, 3]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 1e-9}, [0]),
        ({"top_p": 0.5}, [0, 2]),
        ({"min_p": 0.5}, [0, 2, 3, 4]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 4, "top_p": 0.7}, [0, 2, 3]),
        ({"top_k": 3, "min_p": 0.9}, [0]),
        ({"temperatures": 1e-6}, [0]),
        ({"temperatures": 0.0}, [0]),
        ({"temperatures": 1e-4}, [0]),
    ],
    ids=str,
)
def test_filters(changes: dict[str, float], possible: list[int]) -> None:
    # Probabilities near 0.31, 0.06, and three times 0.21.
    drawn = counts([1.0, -0.7, 0.6, 0.6, 0.6], **changes)
    assert [token for token, count in enumerate(drawn) if count] == possible


@pytest.mark.parametrize(("top_p", "kept"), [(0.05, 1), (0.1, 1), (0.3, 3), (0.5, 5), (0.51, 6), (0.9, 9), (1.0, 10)])
def test_top_p_of_equal_tokens_keeps_the_fewest_that_reach_it(top_p: float, kept: int) -> None:
    drawn = counts([2.5] * 10, top_p=top_p)
    assert [token for token, count in enumerate(drawn) if count] == list(range(kept))


@pytest.mark.parametrize("vocab_size", [8, 1000])
def test_rows_without_a_softmax_are_told(dtype: torch.dtype, vocab_size: int) -> None:
    logits = torch.zeros(7, vocab_size, dtype=dtype)
    logits[1, 5] = NAN
    logits[2, 3] = INF
    logits[3] = -INF
    logits[4] = NAN
    logits[5] = -INF
    logits[5, 4] = 1.0
    logits[6, 1] = -INF
    tokens, is_finite = sample(logits, parameters(7, top_k=2, top_p=0.9))
    assert is_finite.tolist() == [1, 0, 0, 0, 0, 1, 1]
    assert tokens.dtype == is_finite.dtype == torch.int32
    assert ((tokens >= 0) & (tokens < vocab_size)).all()
    assert tokens[5] == 4
    best = ops.sample_greedy(logits)
    assert best.dtype == torch.int64
    assert best.tolist() == [0, -1, -1, -1, -1, 4, 0]
    assert best_ids(logits).tolist() == best_ids(logits.half()).tolist() == best.tolist()


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    vocab_size=st.sampled_from([1, 3, 4, 15, 16, 17, 1023, 1024, 1025, 2047, 5003]),
    planted=st.lists(st.tuples(st.integers(0, 5002), st.sampled_from([7.0, 7.0, INF, -INF, NAN])), max_size=4),
    shift=st.sampled_from([0.0, -50.0]),
    seed=st.integers(0, 2**31),
)
def test_the_first_of_the_largest(
    dtype: torch.dtype, vocab_size: int, planted: list[tuple[int, float]], shift: float, seed: int
) -> None:
    """Few values, so that most rows have ties; and values that end a softmax, anywhere."""
    row = (
        torch.randint(-3, 4, (vocab_size,), generator=torch.Generator().manual_seed(seed), device="cpu").to(dtype)
        + shift
    )
    for place, value in planted:
        row[place % vocab_size] = value
    largest = -1
    if all(not math.isnan(value) for value in row.tolist()) and math.isfinite(max(row.tolist())):
        largest = row.tolist().index(max(row.tolist()))
    assert ops.sample_greedy(row[None].to(torch.get_default_device())).tolist() == [largest]


def test_strided_and_empty_rows(generator: torch.Generator, dtype: torch.dtype) -> None:
    wide, drawn = random_rows(generator, (3, 70), dtype), Parameters.random(generator, 3, 61)
    strided, packed = wide[:, 4:65], wide[:, 4:65].contiguous()
    assert sample(strided, drawn)[0].tolist() == sample(packed, drawn)[0].tolist()
    assert ops.sample_greedy(strided).tolist() == packed.float().argmax(1).tolist()
    assert sample(wide[:0], parameters(0))[0].shape == (0,)


def test_bad_arguments_are_refused_by_name() -> None:
    good = dataclasses.asdict(parameters(2)) | {"logits": torch.zeros(2, 5)}
    ops.sample(**good)
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"logits": torch.zeros(5)}, r"logits has shape \[5\]"),
        ({"logits": torch.zeros(2, 0)}, "vocab_size is 0, expected 1 to"),
        ({"logits": torch.zeros(2, 5).double()}, "logits has dtype float64"),
        ({"top_k": torch.zeros(3, dtype=torch.int32)}, r"top_k has shape \[3\], expected \[num_rows=2\]"),
        ({"top_k": torch.zeros(2).long()}, "top_k has dtype int64, expected int32"),
        ({"top_p": torch.ones(2)}, "top_p has dtype float32, expected float64"),
        ({"min_p": torch.zeros(1)}, "min_p has shape"),
        ({"temperatures": torch.zeros(2, 1)}, "temperatures has shape"),
        ({"keys": torch.zeros(2, dtype=torch.int32)}, "keys has dtype int32"),
        ({"positions": torch.zeros(1).long()}, "positions has shape"),
    ]
    content: list[tuple[dict[str, Tensor], str]] = [
        ({"temperatures": torch.tensor([1, -0.5])}, "temperatures has the entry -0.5.* at flat index 1, expected 0"),
        ({"temperatures": torch.tensor([NAN, 1])}, "temperatures has the entry nan"),
        ({"top_k": torch.tensor([0, -2], dtype=torch.int32)}, "top_k has the entry -2"),
        ({"top_p": torch.tensor([0.0, 1], dtype=torch.float64)}, "top_p has the entry 0.0.*, expected above 0"),
        ({"top_p": torch.tensor([1.1, 1], dtype=torch.float64)}, "top_p has the entry 1.1"),
        ({"min_p": torch.tensor([0, 1.5])}, "min_p has the entry 1.5.*, expected from 0 to 1"),
    ]
    if not good["logits"].is_cuda:  # the host does not read tensors of a GPU
        cases += content
    for change, message in cases:
        with pytest.raises(KernelArgumentError, match=message):
            ops.sample(**{**good, **change})
