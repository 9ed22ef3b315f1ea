from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from tests.ops.segment_cases import MIXED, expected_top_k, hard_scores, int32, new_random, offsets


def top_k(scores: np.ndarray, segments: list[tuple[int, int]]) -> list[int]:
    out = torch.full((sum(kept for _, kept in segments),), -1, dtype=torch.int32)
    sizes, counts = offsets([size for size, _ in segments]), offsets([kept for _, kept in segments])
    assert ops.segmented_top_k(torch.tensor(scores), sizes, counts, out=out) is out
    return out.tolist()


def test_smooth_scores() -> None:
    scores = new_random().random(sum(size for size, _ in MIXED), dtype=np.float32)
    assert top_k(scores, MIXED) == expected_top_k(scores, MIXED)


def test_ties_and_special_numbers() -> None:
    scores = hard_scores(new_random(), sum(size for size, _ in MIXED))
    assert top_k(scores, MIXED) == expected_top_k(scores, MIXED)


@pytest.mark.parametrize("value", [0.0, -1.5, float("nan"), float("-inf"), float("inf")])
def test_of_equal_scores_the_first_are_kept(value: float) -> None:
    scores = np.full(sum(size for size, _ in MIXED), value, dtype=np.float32)
    assert top_k(scores, MIXED) == [i for _, kept in MIXED for i in range(kept)]


def test_nan_is_less_than_any_number_and_both_zeros_are_equal() -> None:
    scores = np.array([np.nan, -np.inf, -np.nan, -0.0, 0.0, 1.0], dtype=np.float32)
    assert [top_k(scores, [(6, kept)]) for kept in range(7)] == [
        [], [5], [3, 5], [3, 4, 5], [1, 3, 4, 5], [0, 1, 3, 4, 5], [0, 1, 2, 3, 4, 5]
    ]  # fmt: skip


def test_the_largest_segment() -> None:
    generator = new_random()
    segments = [(65_536, 32_768), (7, 3), (65_536, 65_535)]
    scores = hard_scores(generator, sum(size for size, _ in segments))
    assert top_k(scores, segments) == expected_top_k(scores, segments)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_equals_a_stable_sort(data: st.DataObject, seed: int) -> None:
    sizes = data.draw(st.lists(st.integers(0, 90), max_size=6))
    segments = [(size, data.draw(st.integers(0, size))) for size in sizes]
    scores = hard_scores(np.random.default_rng(seed), sum(sizes))
    assert top_k(scores, segments) == expected_top_k(scores, segments)


def test_without_out() -> None:
    scores, sizes, counts = torch.tensor([3.0, 1.0, 2.0, 5.0]), int32([0, 3, 4]), int32([0, 2, 2])
    out = ops.segmented_top_k(scores, sizes, counts)
    assert out[:2].tolist() == [0, 2]
    assert len(out) == (4 if scores.is_cuda else 2)
    assert ops.segmented_top_k(scores[:0], int32([0]), int32([0])).shape == (0,)


@pytest.mark.cpu_only
def test_bad_arguments_are_refused_by_name() -> None:
    scores, out = torch.rand(10), torch.full((5,), -1, dtype=torch.int32)
    arguments = {"scores": scores, "cu_scores": int32([0, 6, 10]), "cu_kept": int32([0, 3, 5]), "out": out}
    shared = torch.zeros(15, dtype=torch.int32)
    cases: list[tuple[dict[str, object], str]] = [
        ({"scores": scores.double()}, "scores has dtype float64, expected float32"),
        ({"scores": scores.bfloat16()}, "scores has dtype bfloat16, expected float32"),
        ({"scores": scores[None]}, r"scores has shape \[1, 10\]"),
        ({"scores": torch.rand(20)[::2]}, "scores has stride 2"),
        ({"scores": scores[:9]}, r"cu_scores\[2\] is 10, expected num_scores=9"),
        ({"scores": [1.0]}, "scores is of type|scores"),
        ({"cu_scores": int32([0, 10])}, r"cu_kept has shape \[3\], expected \[num_segments \+ 1=2\]"),
        ({"cu_scores": int32([])}, "cu_scores is empty, expected num_segments \\+ 1 entries"),
        ({"cu_scores": int32([0, 11, 10])}, r"cu_scores\[2\] is 10, expected at least 11"),
        ({"cu_scores": int32([1, 6, 10])}, r"cu_scores\[0\] is 1, expected 0"),
        ({"cu_scores": torch.tensor([0, 6, 10])}, "cu_scores has dtype int64"),
        ({"cu_scores": int32([0, 2, 10])}, "cu_kept keeps 3 scores of segment 0, expected at most its 2"),
        ({"cu_kept": int32([0, 0, 5])}, "cu_kept keeps 5 scores of segment 1, expected at most its 4"),
        ({"cu_kept": int32([0, 3, 4])}, r"cu_kept\[2\] is 4, expected num_kept=5"),
        ({"cu_kept": int32([0, 6, 5])}, r"cu_kept\[2\] is 5, expected at least 6"),
        ({"cu_kept": int32([0, 3, -1]), "out": None}, "cu_kept ends with -1"),
        ({"cu_kept": int32([0, 3, 11]), "out": None}, "cu_kept ends at 11, expected at most num_scores=10"),
        ({"cu_kept": int32([]), "out": None}, "cu_kept is empty"),
        ({"out": out.long()}, "out has dtype int64, expected int32"),
        ({"out": out[:4]}, r"cu_kept\[2\] is 5, expected num_kept=4"),
        ({"out": shared[::3]}, "out has stride 3"),
        ({"scores": shared[5:].view(torch.float32), "out": shared[:10][5:]}, "out shares memory with scores"),
    ]
    for change, message in cases:
        with pytest.raises(KernelArgumentError, match=f"segmented_top_k: {message}"):
            ops.segmented_top_k(**(arguments | change))  # type: ignore[arg-type]
    many: Tensor = torch.zeros(65_537)
    with pytest.raises(KernelArgumentError, match="cu_scores gives segment 0 65537 scores, expected at most 65536"):
        ops.segmented_top_k(many, int32([0, 65_537]), int32([0, 1]))
    assert (out == -1).all()
