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
SHAPES = [(8, 1, 64), (4, 2, 128), (3, 1, 8), (6, 2, 80)]
# Keys and new rows of each sequence, near multiples of a tile's 96 rows, of 256 packed keys, of blocks of 512 keys.
SEQUENCES = [
    [(1, 1)],
    [(40, 1), (40, 40), (40, 0), (17, 5)],
    [(255, 95), (256, 96), (257, 97)],
    [(520, 3), (1030, 513)],
    [],
]


def last_rows(x: torch.Tensor, sequences: list[tuple[int, int]]) -> torch.Tensor:
    """The last rows of every sequence of `x` `[sum of keys, ...]`."""
    parts = x.split([keys for keys, _ in sequences])
    return torch.cat([x[:0], *(part[keys - rows :] for part, (keys, rows) in zip(parts, sequences, strict=True))])


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: list[tuple[int, int]], scale: float
) -> torch.Tensor:
    """q, k and v of all rows, and the attention of the last rows."""
    return last_rows(torch_attention(q, k, v, [keys for keys, _ in sequences], True, scale), sequences)


@pytest.mark.parametrize("case", [*product(SHAPES, SEQUENCES, [16]), *product(SHAPES[:2], SEQUENCES[1:3], [1, 19])])
def test_last_rows_of_sequences(
    generator: torch.Generator,
    dtype: torch.dtype,
    case: tuple[tuple[int, int, int], list[tuple[int, int]], int],
) -> None:
    (num_heads, num_kv_heads, head_dim), sequences, block_size = case
    require_head_dim(head_dim)
    keys = [keys for keys, _ in sequences]
    q = random_rows(generator, (sum(keys), num_heads, head_dim), dtype, 2.0)
    k, v = (random_rows(generator, (sum(keys), num_kv_heads, head_dim), dtype) for _ in range(2))
    cache = PagedCache.of(k, v, keys, block_size)
    cu = offsets([rows for _, rows in sequences])
    new, scale = last_rows(q, sequences), head_dim**-0.5
    out = poisoned((len(new), num_heads * head_dim), dtype)
    arguments = (new, cache.kv_cache, cache.layer_in_block, cache.block_table, cu, cache.context_lens)
    assert ops.attention_extend(*arguments, scale=scale, out=out) is out
    expected = reference(q.double(), k.double(), v.double(), sequences, scale)
    assert_close_to_reference(out, expected, reference(q, k, v, sequences, scale), FLOOR)


@pytest.mark.cpu_only
def test_any_number_of_threads(generator: torch.Generator, dtype: torch.dtype) -> None:
    """Few rows of many heads after long contexts are packed in 16 waves for one thread, and in two for 16."""
    sequences, heads, head_dim = [(1200, 2), (600, 3)], 32, 128
    keys = [keys for keys, _ in sequences]
    q, k, v = (random_rows(generator, (sum(keys), heads, head_dim), dtype) for _ in range(3))
    cache = PagedCache.of(k, v, keys, 16)
    arguments = (
        last_rows(q, sequences),
        cache.kv_cache,
        cache.layer_in_block,
        cache.block_table,
        offsets([rows for _, rows in sequences]),
        cache.context_lens,
    )
    threads, scale = torch.get_num_threads(), head_dim**-0.5
    try:
        results = []
        for count in (1, 2, 5, 16):
            torch.set_num_threads(count)
            results.append(ops.attention_extend(*arguments, scale=scale))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    expected = reference(q.double(), k.double(), v.double(), sequences, scale)
    assert_close_to_reference(results[0], expected, reference(q, k, v, sequences, scale), FLOOR)


@settings(deadline=None, max_examples=40)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 3)]),
    head_dim=st.sampled_from([8, 24, 64]),
    block_size=st.sampled_from([1, 8, 16, 19]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_chunks_give_what_the_whole_gives(
    sequences: list[tuple[int, int]], heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    head_dim, dtype = head_dim_here(head_dim), dtype_here(dtype)
    sequences = [(keys, min(rows, keys)) for keys, rows in sequences]
    keys = [keys for keys, _ in sequences]
    q = torch.randn(sum(keys), heads[0], head_dim).to(dtype)
    k, v = (torch.randn(sum(keys), heads[1], head_dim).to(dtype) for _ in range(2))
    cache = PagedCache.of(k, v, keys, block_size)
    whole = ops.attention(q, k, v, offsets(keys), causal=True, scale=0.3)

    def extend(part: list[tuple[int, int]]) -> torch.Tensor:
        return ops.attention_extend(
            last_rows(q, part),
            cache.kv_cache,
            cache.layer_in_block,
            cache.block_table,
            offsets([rows for _, rows in part]),
            cache.context_lens,
            scale=0.3,
        )

    assert torch.equal(extend([(n, n) for n in keys]), whole), "no context: the same arithmetic"
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(extend(sequences), last_rows(whole, sequences), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("sequences", [[(40, 3), (300, 97)], [(5, 0), (9, 9), (7, 0)], []], ids=str)
def test_rows_behind_the_last_sequence_are_left_alone(
    generator: torch.Generator, dtype: torch.dtype, sequences: list[tuple[int, int]]
) -> None:
    keys = [keys for keys, _ in sequences]
    q, k, v = (random_rows(generator, (sum(keys), 2, 64), dtype) for _ in range(3))
    cache, new = PagedCache.of(k, v, keys, 16), last_rows(q, sequences)
    arguments = (cache.kv_cache, cache.layer_in_block, cache.block_table, offsets([rows for _, rows in sequences]))
    plain = ops.attention_extend(new, *arguments, cache.context_lens, scale=0.1)
    out = poisoned((len(new) + 70, 128), dtype)
    longer = torch.cat([new, poisoned((70, 2, 64), dtype)])
    ops.attention_extend(longer, *arguments, cache.context_lens, scale=0.1, out=out)
    assert torch.equal(out[:-70], plain) and out[-70:].isnan().all()


def test_nan_stays_in_its_sequence(generator: torch.Generator, dtype: torch.dtype) -> None:
    keys, sequences = [33, 34, 33], [(33, 5), (34, 20), (33, 1)]
    q, k, v = (random_rows(generator, (100, 2, 64), dtype) for _ in range(3))
    k[40] = float("nan")
    cache = PagedCache.of(k, v, keys, 16)
    cu = offsets([5, 20, 1])
    arguments = (last_rows(q, sequences), cache.kv_cache, 1, cache.block_table, cu, cache.context_lens)
    out = ops.attention_extend(*arguments, scale=0.1)
    assert out[:5].isfinite().all() and out[25:].isfinite().all()
    assert out[5:25].isnan().all()


@pytest.mark.cpu_only
def test_bad_arguments_are_refused_by_name() -> None:
    q, kv_cache = torch.zeros(5, 4, 16), torch.zeros(5, 3, 2, 2, 8, 16)
    block_table = torch.tensor([[0, 1, -1], [4, 2, 3]], dtype=torch.int32)
    context_lens = torch.tensor([9, 24], dtype=torch.int32)
    cases = [
        ({"q": q.double()}, "q has dtype .*, expected float32 or bfloat16"),
        ({"q": q[0]}, r"q has shape \[4, 16\]"),
        ({"q": q[:, :3]}, "num_heads is 3, expected a multiple of num_kv_heads=2"),
        ({"kv_cache": kv_cache.bfloat16()}, "kv_cache has dtype bfloat16, expected float32"),
        ({"kv_cache": kv_cache[0]}, r"kv_cache has shape \[3, 2, 2, 8, 16\]"),
        ({"layer_in_block": 3}, "layer_in_block is 3, expected 0 to 2"),
        ({"cu_seqlens": offsets([2, 4])}, r"cu_seqlens\[2\] is 6, expected at most num_tokens=5"),
        ({"cu_seqlens": offsets([5])}, r"cu_seqlens has shape \[2\]"),
        ({"context_lens": context_lens[:1]}, r"context_lens has shape \[1\]"),
        ({"context_lens": torch.tensor([1, 24], dtype=torch.int32)}, r"context_lens\[0\] is 1, expected at least .* 2"),
        (
            {"context_lens": torch.tensor([9, 25], dtype=torch.int32)},
            "context_lens has the entry 25 at flat index 1, expected 1 to 24",
        ),
        ({"context_lens": torch.tensor([17, 24], dtype=torch.int32)}, r"block_table\[0, 2\] is -1, expected 0 to 4"),
        ({"scale": -1.0}, "scale is -1.0*, expected a positive finite number"),
        ({"out": torch.zeros(5, 32)}, r"out has shape \[5, 32\]"),
        ({"out": q.view(5, 64)}, "out shares memory with q"),
    ]
    for change, message in cases:
        arguments = {
            "q": q,
            "kv_cache": kv_cache,
            "layer_in_block": 0,
            "block_table": block_table,
            "cu_seqlens": offsets([2, 3]),
            "context_lens": context_lens,
            "scale": 1.0,
        } | change
        with pytest.raises(KernelArgumentError, match=f"attention_extend: {message}"):
            ops.attention_extend(**arguments)
