from __future__ import annotations

import pytest
import torch

from tests.cuda.conftest import Guards
from tests.cuda.emulated import Kernels
from tests.ops.conftest import random_rows
from tests.ops.sample_reference import Parameters, assert_drawn


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
    tokens = guards.poisoned(7, dtype=torch.int64)
    kernels.sample_greedy(tokens, guards.put(logits))
    expected = logits.float().argmax(1)
    expected[1:5] = -1
    assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("vocab_size", [1, 7, 1000, 4096, 9001])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sample(
    kernels: Kernels, guards: Guards, generator: torch.Generator, kind: torch.dtype, vocab_size: int
) -> None:
    num_rows = 12
    logits = random_rows(generator, (num_rows, vocab_size), kind, 3.0)
    drawn = Parameters.random(generator, num_rows, vocab_size)
    if vocab_size > 10:
        logits[1] = 1.0  # all equal
        logits[2, 3:] = -float("inf")
        logits[3, 5] = float("nan")
    drawn.temperatures[4] = 0.0
    drawn.top_k[5], drawn.top_p[6] = 1, 1e-9
    tokens, is_finite = guards.poisoned(num_rows, dtype=torch.int32), guards.poisoned(num_rows, dtype=torch.int32)
    depths = guards.poisoned(num_rows, vocab_size, dtype=torch.int32)
    kernels.sample(tokens, is_finite, guards.put(logits), depths, *(guards.put(value) for value in drawn.tensors()))
    greedy = torch.where(logits.isnan(), -float("inf"), logits.float()).argmax(1)
    for row in ([3] if vocab_size > 10 else []) + [4, 5, 6]:
        assert tokens[row] == greedy[row], row
    assert is_finite.tolist() == [int(not row.isnan().any()) for row in logits]
    random = [row for row in range(num_rows) if row not in (3, 4)]
    assert_drawn(tokens[random], logits[random], Parameters(*(value[random] for value in drawn.tensors())))
