from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.cuda.conftest import Guards, offsets
from tests.cuda.emulated import Kernels
from tests.ops.segment_cases import MIXED, expected_top_k, hard_scores, new_random


def top_k(kernels: Kernels, guards: Guards, scores: np.ndarray, segments: list[tuple[int, int]]) -> list[int]:
    """With room for more than is kept, and scores after the last segment."""
    num_kept = sum(kept for _, kept in segments)
    out = guards.poisoned(num_kept + 3, dtype=torch.int32)
    unwritten = out[num_kept:].clone()
    given = guards.put(torch.from_numpy(np.append(scores, np.float32(9))))
    kernels.segmented_top_k(
        out, given, guards.put(offsets([size for size, _ in segments])), guards.put(offsets([k for _, k in segments]))
    )
    assert torch.equal(out[num_kept:], unwritten), "indices after the last were written"
    return out[:num_kept].tolist()


def test_smooth_scores(kernels: Kernels, guards: Guards) -> None:
    scores = new_random().random(sum(size for size, _ in MIXED), dtype=np.float32)
    assert top_k(kernels, guards, scores, MIXED) == expected_top_k(scores, MIXED)


def test_ties_and_special_numbers(kernels: Kernels, guards: Guards) -> None:
    scores = hard_scores(new_random(), sum(size for size, _ in MIXED))
    assert top_k(kernels, guards, scores, MIXED) == expected_top_k(scores, MIXED)


@pytest.mark.parametrize("value", [0.0, -1.5, float("nan"), float("-inf"), float("inf")])
def test_of_equal_scores_the_first_are_kept(kernels: Kernels, guards: Guards, value: float) -> None:
    scores = np.full(sum(size for size, _ in MIXED), value, dtype=np.float32)
    assert top_k(kernels, guards, scores, MIXED) == [i for _, kept in MIXED for i in range(kept)]


def test_the_largest_segment(kernels: Kernels, guards: Guards) -> None:
    segments = [(65_536, 32_768), (7, 3)]
    scores = hard_scores(new_random(), sum(size for size, _ in segments))
    assert top_k(kernels, guards, scores, segments) == expected_top_k(scores, segments)


def test_no_segments(kernels: Kernels, guards: Guards) -> None:
    assert top_k(kernels, guards, np.zeros(0, dtype=np.float32), []) == []
