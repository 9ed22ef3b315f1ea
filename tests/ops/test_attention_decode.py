from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from tests.ops.attention_reference import (
    FLOOR,
    PagedCache,
    dtype_here,
    head_dim_here,
    offsets,
    require_head_dim,
    torch_attention,
)
from tests.ops.conftest import ATTENTION_DTYPES, assert_close_to_reference, poisoned, random_rows

DTYPES = ATTENTION_DTYPES

# num_heads, num_kv_heads, head_dim
SHAPES = [(8, 1, 64), (4, 2, 128), (3, 1, 8)]
OTHER_SHAPES = [
    (4, 4, 64), (6, 6, 32), (2, 2, 96), (2, 2, 16), (12, 2, 80), (2, 1, 256), (17, 1, 40), (20, 1, 64),
    (14, 2, 64), (10, 2, 32), (9, 1, 96), (16, 1, 128),
]  # fmt: skip
# Lengths near multiples of blocks of 16 rows, chunks of 128 keys and splits of 256 keys (64 on a GPU).
LENGTHS = [[1], [15, 16, 17], [31, 1, 33], [63, 64, 65], [127, 128, 129], [255, 2, 256, 257], [1500, 700], [1] * 20, []]
CASES = [
    *product(SHAPES, LENGTHS, [16]),
    *product(SHAPES, [[1, 31], [290]], [5, 64]),
    *product(OTHER_SHAPES, [[1, 17, 290]], [16, 19]),
]


def last_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """torch's attention of q `[num_seqs, ...]` over each sequence's keys and values."""
    outputs = [torch.empty(0, q.shape[1] * q.shape[2], dtype=dtype)]
    first = 0
    for row, length in zip(q, lengths, strict=True):
        keys, values = (x[first : first + length].to(dtype) for x in (k, v))
        query = row.to(dtype).expand(length, *row.shape)
        outputs.append(torch_attention(query, keys, values, [length], False, scale)[:1])
        first += length
    return torch.cat(outputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1][:4]}-{case[2]}")
def test_paged_decode(
    generator: torch.Generator, dtype: torch.dtype, case: tuple[tuple[int, int, int], list[int], int]
) -> None:
    (num_heads, num_kv_heads, head_dim), lengths, block_size = case
    require_head_dim(head_dim)
    q = random_rows(generator, (len(lengths), num_heads, head_dim), dtype, 2.0)
    k, v = (random_rows(generator, (sum(lengths), num_kv_heads, head_dim), dtype) for _ in range(2))
    cache = PagedCache.of(k, v, lengths, block_size)
    scale = head_dim**-0.5
    out = poisoned((len(lengths), num_heads * head_dim), dtype)
    arguments = (q, cache.kv_cache, cache.layer_in_block, cache.block_table, cache.context_lens)
    assert ops.attention_decode(*arguments, scale=scale, out=out) is out
    reference = last_rows(q, k, v, lengths, scale, torch.float64)
    assert_close_to_reference(out, reference, last_rows(q, k, v, lengths, scale, dtype), FLOOR)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 3), (8, 1), (16, 2), (13, 1)]),
    head_dim=st.sampled_from([8, 24, 32, 64, 96, 128]),
    block_size=st.sampled_from([1, 8, 16, 19, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_decode_equals_the_last_row_of_prefill(
    lengths: list[int], heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    head_dim, dtype = head_dim_here(head_dim), dtype_here(dtype)
    q = torch.randn(sum(lengths), heads[0], head_dim).to(dtype)
    k, v = (torch.randn(sum(lengths), heads[1], head_dim).to(dtype) for _ in range(2))
    cache = PagedCache.of(k, v, lengths, block_size)
    scale = head_dim**-0.5
    last = offsets(lengths)[1:].long() - 1
    prefill = ops.attention(q, k, v, offsets(lengths), causal=True, scale=scale)[last]
    decode = ops.attention_decode(
        q[last], cache.kv_cache, cache.layer_in_block, cache.block_table, cache.context_lens, scale=scale
    )
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(decode, prefill, atol=tolerance, rtol=tolerance)


def test_a_batch_gives_each_sequence_what_it_gets_alone(generator: torch.Generator, dtype: torch.dtype) -> None:
    lengths = [1, 300, 17, 2000]
    wide = random_rows(generator, (4, 3 * 8 * 64), dtype)
    q = wide[:, 512:1024].view(4, 8, 64)  # a strided view
    k, v = (random_rows(generator, (sum(lengths), 2, 64), dtype) for _ in range(2))
    k[1:301] = float("nan")
    cache = PagedCache.of(k, v, lengths, 16)
    out = ops.attention_decode(q, cache.kv_cache, 1, cache.block_table, cache.context_lens, scale=0.1)
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for s in range(4):
        rows = slice(s, s + 1)
        alone = ops.attention_decode(
            q[rows], cache.kv_cache, 1, cache.block_table[rows], cache.context_lens[rows], scale=0.1
        )
        # The splits of the context, and so the order of additions, depend on the batch.
        torch.testing.assert_close(out[rows], alone, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.cpu_only
def test_bad_arguments_are_refused_by_name() -> None:
    q, kv_cache = torch.zeros(2, 4, 16), torch.zeros(5, 3, 2, 2, 8, 16)
    block_table = torch.tensor([[0, 1, -1], [4, 2, 3]], dtype=torch.int32)
    context_lens = torch.tensor([9, 24], dtype=torch.int32)
    flat = kv_cache.view(-1)
    cases = [
        ({"q": q.double()}, "q has dtype .*, expected float32 or bfloat16"),
        ({"q": q[0]}, r"q has shape \[4, 16\], expected \[num_seqs, num_heads, head_dim\]"),
        ({"q": torch.zeros(2, 4, 32)[:, :, ::2]}, "q has stride 2 in its last dimension"),
        ({"q": q[:, :3]}, "num_heads is 3, expected a multiple of num_kv_heads=2"),
        ({"q": q[..., :8]}, r"kv_cache has shape \[5, 3, 2, 2, 8, 16\], expected .*head_dim=8"),
        ({"q": q[..., :4], "kv_cache": kv_cache[..., :4].contiguous()}, "head_dim is 4, expected a multiple of 8"),
        ({"kv_cache": kv_cache.bfloat16()}, "kv_cache has dtype bfloat16, expected float32"),
        ({"kv_cache": kv_cache[0]}, r"kv_cache has shape \[3, 2, 2, 8, 16\]"),
        ({"kv_cache": kv_cache[:, :, :1]}, r"kv_cache has shape \[5, 3, 1, 2, 8, 16\], expected .*2=2"),
        ({"kv_cache": kv_cache.transpose(3, 4)}, r"kv_cache of shape .* has stride 128 in dimension 4"),
        ({"kv_cache": torch.zeros(5, 3, 2, 0, 8, 16)}, "num_kv_heads is 0"),
        ({"kv_cache": kv_cache.to("meta")}, "kv_cache is on "),
        ({"layer_in_block": 3}, "layer_in_block is 3, expected 0 to 2"),
        ({"layer_in_block": -1}, "layer_in_block is -1"),
        ({"block_table": block_table[:1]}, r"block_table has shape \[1, 3\], expected \[num_seqs=2"),
        ({"block_table": block_table.long()}, "block_table has dtype int64"),
        (
            {"block_table": block_table.T.contiguous().T},
            "block_table of shape .* has stride 1 in dimension 1|block_table has stride",
        ),
        ({"block_table": torch.full_like(block_table, 5)}, r"block_table\[0, 0\] is 5, expected 0 to 4"),
        ({"context_lens": torch.tensor([24, 24], dtype=torch.int32)}, r"block_table\[0, 2\] is -1, expected 0 to 4"),
        ({"context_lens": torch.tensor([9, 25], dtype=torch.int32)}, "context_lens has the entry 25 .*1 to 24"),
        ({"context_lens": torch.tensor([0, 24], dtype=torch.int32)}, "context_lens has the entry 0"),
        ({"context_lens": context_lens[:1]}, r"context_lens has shape \[1\]"),
        ({"context_lens": context_lens.long()}, "context_lens has dtype int64"),
        ({"scale": -1.0}, "scale is -1"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"out": torch.zeros(2, 32)}, r"out has shape \[2, 32\]"),
        ({"out": q.view(2, 64)}, "out shares memory with q"),
        ({"out": flat[:128].view(2, 64)}, "out shares memory with kv_cache"),
    ]
    for change, message in cases:
        arguments = {
            "q": q,
            "kv_cache": kv_cache,
            "layer_in_block": 0,
            "block_table": block_table,
            "context_lens": context_lens,
            "scale": 1.0,
        }
        with pytest.raises(KernelArgumentError, match=f"attention_decode: {message}"):
            ops.attention_decode(**(arguments | change))
