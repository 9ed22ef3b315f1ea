from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from tests.ops.attention_reference import FLOOR, dtype_here, head_dim_here, offsets, require_head_dim
from tests.ops.conftest import ATTENTION_DTYPES, assert_close_to_reference, poisoned, seeded
from tests.ops.window_cases import SEQUENCES, WINDOWS, WindowCase

DTYPES = ATTENTION_DTYPES

# num_heads, num_kv_heads, head_dim
SHAPES = [(8, 1, 64), (4, 2, 128), (3, 1, 8)]


def prefill(case: WindowCase, out: Tensor | None = None) -> Tensor:
    """Of a case in which every key has a query."""
    return ops.attention(
        case.q, case.k, case.v, case.cu_seqlens, causal=True, scale=case.scale, first_keys=case.first_keys, out=out
    )


def extend(case: WindowCase, out: Tensor | None = None, block_size: int = 16) -> Tensor:
    cache = case.cache(block_size)
    return ops.attention_extend(
        case.q, cache.kv_cache, cache.layer_in_block, cache.block_table, case.cu_seqlens, cache.context_lens,
        scale=case.scale, first_keys=case.first_keys, out=out,
    )  # fmt: skip


def decode(case: WindowCase, out: Tensor | None = None, block_size: int = 16) -> Tensor:
    """Of a case in which the last key of each sequence has a query."""
    cache = case.cache(block_size)
    return ops.attention_decode(
        case.q, cache.kv_cache, cache.layer_in_block, cache.block_table, cache.context_lens,
        scale=case.scale, first_keys=case.first_keys, out=out,
    )  # fmt: skip


def check(out: Tensor, case: WindowCase) -> None:
    assert_close_to_reference(out, case.reference(torch.float64), case.reference(case.q.dtype), FLOOR)


@pytest.mark.parametrize(("window", "gaps"), WINDOWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_windows_of_a_prefill(
    generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, int, int], window: int, gaps: int
) -> None:
    require_head_dim(shape[2])
    for sequences in SEQUENCES:
        case = WindowCase.of(generator, [(keys, keys) for keys, _ in sequences], shape, dtype, window, gaps)
        out = poisoned((len(case.q), shape[0] * shape[2]), dtype)
        assert prefill(case, out) is out
        check(out, case)


@pytest.mark.parametrize(("window", "gaps"), WINDOWS)
@pytest.mark.parametrize(("shape", "block_size"), [*product(SHAPES, [16]), (SHAPES[0], 19)], ids=str)
def test_windows_of_new_rows_over_the_cache(
    generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, int, int], block_size: int, window: int, gaps: int
) -> None:
    require_head_dim(shape[2])
    for sequences in SEQUENCES:
        case = WindowCase.of(generator, sequences, shape, dtype, window, gaps)
        out = poisoned((len(case.q), shape[0] * shape[2]), dtype)
        assert extend(case, out, block_size) is out
        check(out, case)


@pytest.mark.parametrize(("window", "gaps"), WINDOWS)
@pytest.mark.parametrize(("shape", "block_size"), [*product([*SHAPES, (2, 2, 64)], [16]), (SHAPES[1], 5)], ids=str)
def test_windows_of_one_row(
    generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, int, int], block_size: int, window: int, gaps: int
) -> None:
    require_head_dim(shape[2])
    for keys in ([1], [16, 17, 31, 300], [1500, 700]):
        case = WindowCase.of(generator, [(count, 1) for count in keys], shape, dtype, window, gaps)
        out = poisoned((len(keys), shape[0] * shape[2]), dtype)
        assert decode(case, out, block_size) is out
        check(out, case)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 3)]),
    head_dim=st.sampled_from([8, 24, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.integers(1, 320),
    gaps=st.sampled_from([0, 3, 400]),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_all_kernels_agree_on_a_window(
    lengths: list[int],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    window: int,
    gaps: int,
    share: float,
    seed: int,
) -> None:
    shape, dtype = (*heads, head_dim_here(head_dim)), dtype_here(dtype)
    whole = WindowCase.of(seeded(seed), [(length, length) for length in lengths], shape, dtype, window, gaps)
    expected = prefill(whole)
    assert torch.equal(extend(whole), expected), "no context: the same arithmetic"
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    rows = [int(share * length) for length in lengths]
    torch.testing.assert_close(extend(cut(whole, rows)), last(expected, whole, rows), atol=tolerance, rtol=tolerance)
    ones = [1] * len(lengths)
    torch.testing.assert_close(decode(cut(whole, ones)), last(expected, whole, ones), atol=tolerance, rtol=tolerance)


def cut(whole: WindowCase, rows: list[int]) -> WindowCase:
    """The same keys, and queries of the last rows alone."""
    sequences = list(zip(whole.keys, rows, strict=True))
    seen = [all_seen[len(all_seen) - count :] for all_seen, count in zip(whole.seen, rows, strict=True)]
    return WindowCase(sequences, last(whole.q, whole, rows), whole.k, whole.v, seen, whole.scale)


def last(x: Tensor, whole: WindowCase, rows: list[int]) -> Tensor:
    """The last rows of each sequence of `x` `[sum of keys, ...]`."""
    parts = x.split(whole.keys)
    return torch.cat([x[:0], *(part[len(part) - count :] for part, count in zip(parts, rows, strict=True))])


def test_a_window_as_long_as_the_prompt_changes_no_bit(generator: torch.Generator, dtype: torch.dtype) -> None:
    for keys in (17, 513, 700):
        case = WindowCase.of(generator, [(keys, keys)], (4, 2, 64), dtype, keys)
        plain = ops.attention(case.q, case.k, case.v, case.cu_seqlens, causal=True, scale=case.scale)
        assert torch.equal(prefill(case), plain)
        assert not case.first_keys.any()


def test_a_window_of_one_row_gives_its_own_values(generator: torch.Generator, dtype: torch.dtype) -> None:
    case = WindowCase.of(generator, [(700, 700), (33, 33)], (4, 2, 64), dtype, 1)
    expected = case.v.repeat_interleave(2, dim=1).flatten(1)
    torch.testing.assert_close(prefill(case), expected, atol=1e-6, rtol=1e-6)


def test_a_batch_gives_each_sequence_what_it_gets_alone(generator: torch.Generator, dtype: torch.dtype) -> None:
    lengths = [700, 1, 513, 40]
    case = WindowCase.of(generator, [(length, length) for length in lengths], (8, 2, 64), dtype, 90, 40)
    together = prefill(case)
    parts = zip(*(x.split(lengths) for x in (case.q, case.k, case.v, case.first_keys, together)), strict=True)
    for q, k, v, first_keys, expected in parts:
        cu_seqlens = offsets([len(q)])
        alone = ops.attention(q, k, v, cu_seqlens, causal=True, scale=case.scale, first_keys=first_keys)
        assert torch.equal(alone, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_keys_far_before_a_window_are_not_read(generator: torch.Generator, dtype: torch.dtype, value: float) -> None:
    """Blocks of keys that no row of a tile sees: what they hold does not matter."""
    case = WindowCase.of(generator, [(1200, 1200)], (4, 2, 64), dtype, 50)
    clean = [prefill(case), extend(case), decode(cut(case, [1]))]
    case.k[:100] = case.v[:100] = value
    for before, now in zip(clean, (prefill(case), extend(case), decode(cut(case, [1]))), strict=True):
        rows = slice(-600, None)
        assert torch.equal(now[rows], before[rows])
        assert now[rows].isfinite().all()


@pytest.mark.cpu_only
def test_bad_first_keys_are_refused_by_name(generator: torch.Generator) -> None:
    case = WindowCase.of(generator, [(4, 4), (5, 5)], (4, 2, 16), torch.float32, 3)
    assert case.first_keys.tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 2]

    def changed(row: int, value: int) -> Tensor:
        first_keys = case.first_keys
        first_keys[row] = value
        return first_keys

    out = torch.zeros(9, 64)
    cases = [
        (case.first_keys.long(), "first_keys has dtype int64, expected int32"),
        (case.first_keys[:8], r"first_keys has shape \[8\], expected \[num_tokens=9\]"),
        (case.first_keys.to("meta"), "first_keys is on "),
        (torch.zeros(9, 2, dtype=torch.int32)[:, 0], "first_keys .* has stride 2|first_keys has stride 2"),
        (out.view(-1)[:9].view(torch.int32), "out shares memory with first_keys"),
        (changed(0, -1), r"first_keys\[0\] is -1, expected 0 to 0: at least that of the row before"),
        (changed(3, 4), r"first_keys\[3\] is 4, expected 0 to 3: .* at most the row's own key"),
        (changed(8, 0), r"first_keys\[8\] is 0, expected 1 to 4"),
        (changed(4, 1), r"first_keys\[4\] is 1, expected 0 to 0"),
    ]
    cache = case.cache()
    paged = (cache.kv_cache, cache.layer_in_block, cache.block_table)
    for first_keys, message in cases:
        with pytest.raises(KernelArgumentError, match=f"attention: {message}"):
            ops.attention(
                case.q, case.k, case.v, case.cu_seqlens, causal=True, scale=1.0, first_keys=first_keys, out=out
            )
        with pytest.raises(KernelArgumentError, match=f"attention_extend: {message}"):
            ops.attention_extend(
                case.q, *paged, case.cu_seqlens, cache.context_lens, scale=1.0, first_keys=first_keys, out=out
            )
    with pytest.raises(KernelArgumentError, match="attention: first_keys is given, expected None where .* not causal"):
        ops.attention(case.q, case.k, case.v, case.cu_seqlens, causal=False, scale=1.0, first_keys=case.first_keys)


@pytest.mark.cpu_only
def test_bad_first_keys_of_one_row_are_refused_by_name(generator: torch.Generator) -> None:
    case = WindowCase.of(generator, [(4, 1), (5, 1)], (4, 2, 16), torch.float32, 3)
    cache = case.cache()
    for first_keys, message in [
        (case.first_keys.long(), "first_keys has dtype int64, expected int32"),
        (case.first_keys[:1], r"first_keys has shape \[1\], expected \[num_seqs=2\]"),
        (torch.tensor([4, 0], dtype=torch.int32), r"first_keys\[0\] is 4, expected 0 to 3"),
        (torch.tensor([0, -1], dtype=torch.int32), r"first_keys\[1\] is -1, expected 0 to 4"),
    ]:
        with pytest.raises(KernelArgumentError, match=f"attention_decode: {message}"):
            ops.attention_decode(
                case.q, cache.kv_cache, cache.layer_in_block, cache.block_table, cache.context_lens,
                scale=1.0, first_keys=first_keys,
            )  # fmt: skip
