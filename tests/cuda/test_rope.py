from __future__ import annotations

import pytest
import torch

from tests.cuda.conftest import Guards, assert_near, int32, offsets
from tests.cuda.emulated import KernelError, Kernels
from tests.ops.conftest import random_rows

MAX_POSITIONS = 90
MAX_CACHE_ROWS = 40


@pytest.mark.parametrize("head_dim", [2, 16, 24, 64, 96, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
@pytest.mark.parametrize("extra_rows", [0, 3])
@pytest.mark.parametrize("has_norm", [False, True])
def test_rope_store(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, head_dim: int, heads: int,
    kv_heads: int, extra_rows: int, has_norm: bool,
) -> None:  # fmt: skip
    lengths, firsts, block_size, layer = [5, 0, 1, 9], [0, 3, 30, 7], 5, 1
    max_blocks, num_tokens = MAX_CACHE_ROWS // block_size, sum(lengths)
    # Rows after the last sequence stay as they are; a buffer for a larger batch has such rows.
    qkv = guards.put(random_rows(generator, (num_tokens + extra_rows, (heads + 2 * kv_heads) * head_dim), dtype))
    before = qkv.clone()
    cache_rows = [first + i for first, length in zip(firsts, lengths, strict=True) for i in range(length)]
    # Some rows before each row were dropped, and the remaining rows kept their positions.
    gaps = torch.randint(0, 5, (num_tokens,), generator=generator).cumsum(0).tolist()
    positions = [row + gap for row, gap in zip(cache_rows, gaps, strict=True)]
    angles = torch.randn(MAX_POSITIONS, head_dim // 2, generator=generator) * 10
    cos_sin = guards.put(torch.cat([angles.cos(), angles.sin()], 1))
    norms = [guards.put(random_rows(generator, (head_dim,), dtype, 0.3, 1.0)) for _ in range(2)]
    blocks = torch.randperm(4 * max_blocks + 2, generator=generator)[: 4 * max_blocks]
    block_table = blocks.reshape(4, max_blocks).to(torch.int32)
    cache = guards.poisoned(4 * max_blocks + 2, 3, 2, kv_heads, block_size, head_dim, dtype=dtype)
    kernels.rope_store(
        qkv, guards.put(int32(positions + [-1] * extra_rows)), guards.put(int32(cache_rows + [-1] * extra_rows)),
        cos_sin, cache, layer, guards.put(block_table), guards.put(offsets(lengths)), heads, kv_heads,
        *(norms if has_norm else (None, None)), 1e-3,
    )  # fmt: skip

    parts = before.double()[:num_tokens].unflatten(1, (-1, head_dim))
    turning = parts[:, : heads + kv_heads]
    if has_norm:
        weights = torch.stack([norms[0]] * heads + [norms[1]] * kv_heads).double()
        turning = turning * torch.rsqrt(turning.pow(2).mean(-1, keepdim=True) + 1e-3) * weights
    real, imaginary = turning.chunk(2, dim=-1)
    cosines, sines = cos_sin.double()[positions].unsqueeze(1).chunk(2, dim=-1)
    turned = torch.cat([real * cosines - imaginary * sines, imaginary * cosines + real * sines], -1)
    rows = qkv[:num_tokens].unflatten(1, (-1, head_dim))
    assert_near(rows[:, : heads + kv_heads], turned, 1.0, 1e-6)
    assert torch.equal(rows[:, heads + kv_heads :].double(), parts[:, heads + kv_heads :])
    assert torch.equal(qkv[num_tokens:], before[num_tokens:])

    expected = torch.full_like(cache, float("nan"))
    sequences = [s for s, length in enumerate(lengths) for _ in range(length)]
    for row, (s, cache_row) in enumerate(zip(sequences, cache_rows, strict=True)):
        block = block_table[s, cache_row // block_size]
        expected[block, layer, :, :, cache_row % block_size] = rows[row, heads:].unflatten(0, (2, kv_heads))
    assert torch.equal(cache.isnan(), expected.isnan())
    assert torch.equal(cache.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize(("head_dim", "dtype"), [(512, torch.float32), (1024, torch.float32)])
def test_norms_of_heads_that_a_block_holds(kernels: Kernels, guards: Guards, head_dim: int, dtype: torch.dtype) -> None:
    qkv, norm = guards.put(torch.ones(1, 3 * head_dim, dtype=dtype)), torch.ones(head_dim, dtype=dtype)
    cache, table = guards.poisoned(1, 1, 2, 1, 4, head_dim, dtype=dtype), int32([[0]])
    cos_sin = torch.cat([torch.ones(1, head_dim // 2), torch.zeros(1, head_dim // 2)], 1)
    arguments = (qkv, int32([0]), int32([0]), cos_sin, cache, 0, table, offsets([1]), 1, 1, norm, norm, 3.0)
    if head_dim > 512:
        with pytest.raises(KernelError, match="head_dim of normed heads on cuda is 1024, expected 2 to 512"):
            kernels.rope_store(*arguments)
        return
    kernels.rope_store(*arguments)
    assert_near(qkv[0, : 2 * head_dim], torch.full((2 * head_dim,), 0.5, dtype=torch.float64))
