from __future__ import annotations

import pytest
import torch

from tests.cuda.conftest import Guards
from tests.cuda.emulated import Kernels
from tests.ops.conftest import random_rows


@pytest.mark.parametrize("vocab_size", [1, 7, 1000, 8192, 9001])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sample_greedy(
    kernels: Kernels, guards: Guards, generator: torch.Generator, kind: torch.dtype, vocab_size: int
) -> None:
    logits = random_rows(generator, (7, vocab_size), kind)
    logits[1, vocab_size // 2] = float("nan")
    logits[2, vocab_size // 3] = float("inf")
    logits[3] = -float("inf")
    logits[4] = float("nan")
    logits[5] = 1.0  # all equal: the first
    tokens, is_finite = guards.poisoned(7, dtype=torch.int32), guards.poisoned(7, dtype=torch.int32)
    kernels.sample_greedy(tokens, is_finite, guards.put(logits))
    expected = torch.where(logits.isnan(), -float("inf"), logits.float()).argmax(1)
    expected[4] = 0
    assert tokens.tolist() == expected.tolist()
    assert is_finite.tolist() == [1, 0, 0, 0, 0, 1, 1]
