from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import Guards, assert_near, offsets
from tests.cuda.emulated import KernelError, Kernels
from tests.ops.attention_reference import PagedCache
from tests.ops.conftest import random_rows
from tests.ops.window_cases import WindowCase

HEAD_DIMS = [16, 32, 64, 96, 128]
# Softmax weights are rounded to 16 bits before they are multiplied by the values.
FLOOR = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], contexts: list[int], causal: bool, scale: float
) -> Tensor:
    """float64; q `[sum of lengths, num_heads, head_dim]`, k and v `[sum of contexts, num_kv_heads, head_dim]`."""
    group = q.shape[1] // k.shape[1]
    outputs = [torch.empty(0, q.shape[1] * q.shape[2], dtype=torch.float64)]
    parts = (q.split(lengths), k.split(contexts), v.split(contexts))
    for one_q, one_k, one_v in zip(*([x.double() for x in part] for part in parts), strict=True):
        rows, keys = one_q.shape[0], one_k.shape[0]
        scores = torch.einsum("qhd,khd->hqk", one_q, one_k.repeat_interleave(group, 1)) * scale
        if causal:
            seen = torch.arange(keys) <= torch.arange(keys - rows, keys)[:, None]
            scores = scores.masked_fill(~seen, -math.inf)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), one_v.repeat_interleave(group, 1))
        outputs.append(out.flatten(1))
    return torch.cat(outputs)


def fused(
    generator: torch.Generator, rows: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, guards: Guards
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as views of one buffer, as the projection leaves them."""
    buffer = guards.put(random_rows(generator, (rows, heads + 2 * kv_heads, head_dim), dtype, 1.5))
    q, k, v = buffer.split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_attention(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, head_dim: int, causal: bool
) -> None:
    lengths = [1, 0, 63, 64, 65, 17, 130] if head_dim == 64 else [3, 65, 0, 20]
    heads, kv_heads = (4, 2) if head_dim == 32 else (2, 1) if head_dim == 16 else (1, 1)
    q, k, v = fused(generator, sum(lengths), heads, kv_heads, head_dim, dtype, guards)
    out = guards.poisoned(sum(lengths), heads * head_dim, dtype=dtype)
    scale = head_dim**-0.5
    kernels.attention(out, q, k, v, guards.put(offsets(lengths)), None, causal, scale)
    expected = reference(q, k, v, lengths, lengths, causal, scale)
    assert_near(out, expected, 1.0, FLOOR[dtype])


# Lengths near multiples of blocks of 128 rows, warps of 32 rows and tiles of 32 keys; their mean selects wide blocks.
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("lengths", [[128, 257, 127], [350, 1, 33]], ids=str)
def test_wide_blocks(
    kernels: Kernels, guards: Guards, generator: torch.Generator, head_dim: int, causal: bool, lengths: list[int]
) -> None:
    dtype, heads = torch.bfloat16, 4
    q, k, v = fused(generator, sum(lengths), heads, 2, head_dim, dtype, guards)
    out = guards.poisoned(sum(lengths), heads * head_dim, dtype=dtype)
    scale = head_dim**-0.5
    kernels.attention(out, q, k, v, guards.put(offsets(lengths)), None, causal, scale)
    assert_near(out, reference(q, k, v, lengths, lengths, causal, scale), 1.0, FLOOR[dtype])
    # The same rows among short sequences, which are computed in narrow blocks.
    beside = [1] * 8
    assert sum(lengths) < 128 * (len(lengths) + len(beside))
    batch = [guards.put(torch.cat((x, x[: len(beside)]))) for x in (q, k, v)]
    narrow = guards.poisoned(sum(lengths + beside), heads * head_dim, dtype=dtype)
    kernels.attention(narrow, *batch, guards.put(offsets(lengths + beside)), None, causal, scale)
    assert torch.equal(narrow[: sum(lengths)], out)


def test_many_short_sequences_and_a_long_one(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype
) -> None:
    # More sequences than a warp has lanes.
    lengths = [(7 * i) % 5 for i in range(40)] + [150, 2]
    q, k, v = fused(generator, sum(lengths), 1, 1, 16, dtype, guards)
    out = guards.poisoned(sum(lengths), 16, dtype=dtype)
    kernels.attention(out, q, k, v, guards.put(offsets(lengths)), None, True, 0.25)
    assert_near(out, reference(q, k, v, lengths, lengths, True, 0.25), 1.0, FLOOR[dtype])


def test_large_scores_do_not_overflow(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype
) -> None:
    q, k, v = fused(generator, 80, 1, 1, 32, dtype, guards)
    out = guards.poisoned(80, 32, dtype=dtype)
    kernels.attention(out, q, k, v, guards.put(offsets([80])), None, True, 4.0)
    assert_near(out, reference(q, k, v, [80], [80], True, 4.0), 1.0, 4 * FLOOR[dtype])


def test_empty_batch(kernels: Kernels, guards: Guards, dtype: torch.dtype) -> None:
    q = guards.poisoned(0, 2, 16, dtype=dtype)
    kernels.attention(guards.poisoned(0, 32, dtype=dtype), q, q.clone(), q.clone(), offsets([0, 0]), None, True, 1.0)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block_size", [16, 5])
def test_attention_extend(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, head_dim: int, block_size: int
) -> None:
    lengths, contexts = [10, 0, 70, 1], [90, 3, 70, 64]
    heads, kv_heads = (2, 1) if head_dim < 96 else (1, 1)
    q = guards.put(random_rows(generator, (sum(lengths), heads, head_dim), dtype))
    k, v = (random_rows(generator, (sum(contexts), kv_heads, head_dim), dtype) for _ in range(2))
    cache = PagedCache.of(k, v, contexts, block_size)
    out = guards.poisoned(sum(lengths), heads * head_dim, dtype=dtype)
    scale = head_dim**-0.5
    kernels.attention_extend(
        out, q, guards.put(cache.kv_cache), cache.layer_in_block, guards.put(cache.block_table),
        guards.put(offsets(lengths)), guards.put(cache.context_lens), None, scale,
    )  # fmt: skip
    assert_near(out, reference(q, k, v, lengths, contexts, True, scale), 1.0, FLOOR[dtype])


@pytest.mark.parametrize("window", [1, 31, 32, 33, 100, 700])
@pytest.mark.parametrize("gaps", [0, 60])
@pytest.mark.parametrize("shape", [(4, 2, 32), (1, 1, 128)], ids=str)
def test_windows(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, int, int],
    gaps: int, window: int,
) -> None:  # fmt: skip
    lengths = [(length, length) for length in ([130, 0, 65, 1] if shape[2] == 32 else [3, 200])]
    case = WindowCase.of(generator, lengths, shape, dtype, window, gaps)
    q, k, v, cu_seqlens, first_keys = map(guards.put, (case.q, case.k, case.v, case.cu_seqlens, case.first_keys))
    out = guards.poisoned(len(q), shape[0] * shape[2], dtype=dtype)
    kernels.attention(out, q, k, v, cu_seqlens, first_keys, True, case.scale)
    assert_near(out, case.reference(torch.float64), 1.0, FLOOR[dtype])


@pytest.mark.parametrize("window", [1, 33, 100, 700])
@pytest.mark.parametrize("gaps", [0, 60])
@pytest.mark.parametrize("lengths", [[128, 257, 127], [350, 1, 33]], ids=str)
def test_windows_of_wide_blocks(
    kernels: Kernels, guards: Guards, generator: torch.Generator, lengths: list[int], gaps: int, window: int
) -> None:
    dtype = torch.bfloat16
    case = WindowCase.of(generator, [(length, length) for length in lengths], (4, 2, 64), dtype, window, gaps)
    out = guards.poisoned(len(case.q), 256, dtype=dtype)
    first_keys = guards.put(case.first_keys)
    kernels.attention(out, case.q, case.k, case.v, case.cu_seqlens, first_keys, True, case.scale)
    assert_near(out, case.reference(torch.float64), 1.0, FLOOR[dtype])
    # The same rows among short sequences, which are computed in narrow blocks.
    beside = [1] * 8
    assert len(case.q) < 128 * (len(lengths) + len(beside))
    batch = [torch.cat((x, x[: len(beside)])) for x in (case.q, case.k, case.v)]
    narrow = guards.poisoned(len(batch[0]), 256, dtype=dtype)
    firsts = torch.cat((case.first_keys, torch.zeros(len(beside), dtype=torch.int32)))
    kernels.attention(narrow, *batch, offsets(lengths + beside), guards.put(firsts), True, case.scale)
    assert torch.equal(narrow[: len(case.q)], out)


@pytest.mark.parametrize("window", [1, 33, 90, 700])
@pytest.mark.parametrize("gaps", [0, 60])
@pytest.mark.parametrize("block_size", [16, 5])
def test_windows_of_attention_extend(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, block_size: int, gaps: int,
    window: int,
) -> None:  # fmt: skip
    case = WindowCase.of(generator, [(90, 10), (3, 0), (70, 70), (300, 1)], (2, 1, 64), dtype, window, gaps)
    cache = case.cache(block_size)
    out = guards.poisoned(len(case.q), 128, dtype=dtype)
    kernels.attention_extend(
        out, guards.put(case.q), guards.put(cache.kv_cache), cache.layer_in_block, guards.put(cache.block_table),
        guards.put(case.cu_seqlens), guards.put(cache.context_lens), guards.put(case.first_keys), case.scale,
    )  # fmt: skip
    assert_near(out, case.reference(torch.float64), 1.0, FLOOR[dtype])


def test_bad_arguments_are_refused_by_name(kernels: Kernels, dtype: torch.dtype) -> None:
    def run(head_dim: int, kind: torch.dtype = dtype, first: int = 0) -> None:
        buffer = torch.zeros(4, 3, head_dim + first, dtype=kind)[..., first:]
        q, k, v = buffer.split(1, dim=1)
        kernels.attention(torch.zeros(4, head_dim, dtype=kind), q, k, v, offsets([4]), None, True, 1.0)

    with pytest.raises(KernelError, match="attention: head_dim is 40, expected one of 16, 32, 64, 96, 128 on cuda"):
        run(40)
    with pytest.raises(KernelError, match="q has dtype float32, expected bfloat16 or float16"):
        run(16, torch.float32)
    with pytest.raises(KernelError, match="q is not aligned"):
        run(16, dtype, 4)
    far = torch.empty(2**30 + 16, dtype=dtype).as_strided((2, 1, 16), (2**30, 16, 1))  # memory that is never touched
    near = torch.zeros(2, 1, 16, dtype=dtype)
    with pytest.raises(KernelError, match="k has rows 1073741824 elements apart, expected less than 1073741824"):
        kernels.attention(torch.zeros(2, 16, dtype=dtype), near, far, near, offsets([2]), None, True, 1.0)
