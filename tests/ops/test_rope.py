from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from tests.ops.conftest import assert_close_to_reference, poisoned, random_rows, seeded

MAX_POSITIONS = 200
MAX_CACHE_ROWS = 64


@dataclass
class Case:
    """Sequences of the given lengths with different first positions and cache rows, in a shuffled pool of blocks.

    Cache rows are consecutive. Positions have gaps, as after rows were dropped and the others kept their positions.
    """

    lengths: list[int]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    generator: torch.Generator
    block_size: int = 4
    layers_per_block: int = 3
    has_norm: bool = False
    eps: float = 1e-3

    def __post_init__(self) -> None:
        num_tokens, num_seqs = sum(self.lengths), len(self.lengths)
        columns = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = random_rows(self.generator, (num_tokens, columns), self.dtype)
        first = torch.randint(0, 20, (2, num_seqs), generator=self.generator)
        steps = torch.randint(1, 6, (num_tokens,), generator=self.generator)
        counted = [torch.arange(n) for n in self.lengths]
        self.cache_rows = packed([a + rows for a, rows in zip(first[0], counted, strict=True)])
        self.positions = packed([a + s.cumsum(0) for a, s in zip(first[1], steps.split(self.lengths), strict=True)])
        self.cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)
        norms = random_rows(self.generator, (2, self.head_dim), self.dtype, 0.3, 1.0) if self.has_norm else (None, None)
        self.q_norm, self.k_norm = norms
        angles = torch.randn(MAX_POSITIONS, self.head_dim // 2, generator=self.generator) * 10
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
        max_blocks = MAX_CACHE_ROWS // self.block_size
        num_blocks = num_seqs * max_blocks + 2
        blocks = torch.randperm(num_blocks, generator=self.generator)[: num_seqs * max_blocks]
        self.block_table = blocks.reshape(num_seqs, max_blocks).to(torch.int32)
        shape = (num_blocks, self.layers_per_block, 2, self.num_kv_heads, self.block_size, self.head_dim)
        self.kv_cache = poisoned(shape, self.dtype)

    def run(self, layer: int = 1) -> None:
        ops.rope_store(
            self.qkv, self.positions, self.cache_rows, self.cos_sin, self.kv_cache, layer, self.block_table,
            self.cu_seqlens, self.num_heads, self.num_kv_heads, q_norm=self.q_norm, k_norm=self.k_norm, eps=self.eps,
        )  # fmt: skip

    def stored(self, layer: int) -> Tensor:
        """The expected cache, from the keys and values in qkv."""
        expected = poisoned(tuple(self.kv_cache.shape), self.dtype)
        heads = self.qkv.unflatten(1, (-1, self.head_dim))[:, self.num_heads :].unflatten(1, (2, self.num_kv_heads))
        for b in range(len(self.lengths)):
            for t in range(self.cu_seqlens[b], self.cu_seqlens[b + 1]):
                block, row = divmod(int(self.cache_rows[t]), self.block_size)
                expected[self.block_table[b, block], layer, :, :, row] = heads[t]
        return expected

    def rotated(self, dtype: torch.dtype) -> Tensor:
        """The expected qkv, computed in `dtype`."""
        heads = self.qkv.to(dtype).unflatten(1, (-1, self.head_dim)).clone()
        cosines, sines = self.cos_sin.to(dtype)[self.positions.long()].unsqueeze(1).chunk(2, dim=-1)
        turning = self.normed(heads)
        real, imaginary = turning.chunk(2, dim=-1)
        turned = torch.cat([real * cosines - imaginary * sines, imaginary * cosines + real * sines], dim=-1)
        heads[:, : self.num_heads + self.num_kv_heads] = turned
        return heads.flatten(1)

    def normed(self, heads: Tensor) -> Tensor:
        """Queries and keys of `[num_tokens, all heads, head_dim]`; normed as by transformers' Qwen3RMSNorm."""
        queries, keys = heads[:, : self.num_heads], heads[:, self.num_heads : self.num_heads + self.num_kv_heads]
        if self.q_norm is None or self.k_norm is None:
            return torch.cat([queries, keys], dim=1)
        parts = []
        for part, weight in ((queries, self.q_norm), (keys, self.k_norm)):
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
            parts.append(weight.to(part.dtype) * normed.to(part.dtype))
        return torch.cat(parts, dim=1)


def packed(parts: list[Tensor]) -> Tensor:
    return torch.cat([*parts, torch.empty(0)]).to(torch.int32)


def assert_same(cache: Tensor, expected: Tensor) -> None:
    assert torch.equal(cache.isnan(), expected.isnan()), "a row outside the sequences was written"
    assert torch.equal(cache.nan_to_num(), expected.nan_to_num())


SIZES = [(1, 1, 2), (4, 4, 16), (4, 2, 10), (3, 1, 64), (2, 2, 80), (8, 2, 128), (1, 1, 34)]


@pytest.mark.parametrize("lengths", [[1], [5, 1, 7], [30, 2], [], [0, 3, 0]], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rotates_and_stores(
    generator: torch.Generator, dtype: torch.dtype, sizes: tuple[int, int, int], lengths: list[int]
) -> None:
    case = Case(lengths, *sizes, dtype, generator)
    reference, same_precision = case.rotated(torch.float64), case.rotated(dtype)
    case.run(layer=1)
    assert_close_to_reference(case.qkv, reference, same_precision)
    assert_same(case.kv_cache, case.stored(layer=1))


@pytest.mark.parametrize("lengths", [[5, 1, 7], [0, 3, 0]], ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, (2, 1, 512)], ids=str)
def test_norms_heads_before_it_rotates_them(
    generator: torch.Generator, dtype: torch.dtype, sizes: tuple[int, int, int], lengths: list[int]
) -> None:
    case = Case(lengths, *sizes, dtype, generator, has_norm=True)
    values = case.qkv[:, -case.num_kv_heads * case.head_dim :].clone()
    reference, same_precision = case.rotated(torch.float64), case.rotated(dtype)
    case.run(layer=1)
    assert_close_to_reference(case.qkv, reference, same_precision)
    assert torch.equal(case.qkv[:, -case.num_kv_heads * case.head_dim :], values)
    assert_same(case.kv_cache, case.stored(layer=1))


@pytest.mark.parametrize("first", [0, MAX_POSITIONS - MAX_CACHE_ROWS], ids=["first", "last"])
def test_any_positions_in_any_cache_rows(generator: torch.Generator, dtype: torch.dtype, first: int) -> None:
    """Positions and cache rows need not ascend, positions may repeat, and both may be the last of their tables."""
    case = Case([MAX_CACHE_ROWS, 7], 2, 1, 16, dtype, generator)
    case.cache_rows = packed([torch.randperm(MAX_CACHE_ROWS, generator=generator)[:n] for n in case.lengths])
    case.positions = torch.randint(0, MAX_POSITIONS, (sum(case.lengths),), generator=generator).to(torch.int32)
    case.positions[:MAX_CACHE_ROWS] = first + torch.randperm(MAX_CACHE_ROWS, generator=generator)
    reference, same_precision = case.rotated(torch.float64), case.rotated(dtype)
    case.run(layer=2)
    assert_close_to_reference(case.qkv, reference, same_precision)
    assert_same(case.kv_cache, case.stored(layer=2))


def test_positions_move_no_row_and_cache_rows_turn_none(generator: torch.Generator, dtype: torch.dtype) -> None:
    here, there = Case([5, 3], 2, 1, 16, dtype, generator), Case([5, 3], 2, 1, 16, dtype, generator)
    there.qkv, there.cos_sin, there.positions = here.qkv.clone(), here.cos_sin, here.positions
    here.run()
    there.run()
    assert torch.equal(here.qkv, there.qkv)
    elsewhere = Case([5, 3], 2, 1, 16, dtype, generator)
    elsewhere.cache_rows, elsewhere.block_table = here.cache_rows, here.block_table
    elsewhere.run()
    assert torch.equal(here.kv_cache.isnan(), elsewhere.kv_cache.isnan())


def test_values_stay_bit_exact_and_rows_may_be_strided(generator: torch.Generator, dtype: torch.dtype) -> None:
    case = Case([6, 3], 4, 2, 16, dtype, generator)
    wide = random_rows(generator, (9, case.qkv.shape[1] + 5), dtype)
    before = wide.clone()
    wide[:, : case.qkv.shape[1]] = case.qkv
    values = case.qkv[:, -32:].clone()
    case.qkv = wide[:, : case.qkv.shape[1]]
    case.run()
    assert torch.equal(case.qkv[:, -32:], values)
    assert torch.equal(wide[:, -5:], before[:, -5:])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), half=st.integers(1, 40), num_tokens=st.integers(1, 12))
def test_the_opposite_angle_undoes_the_rotation(seed: int, half: int, num_tokens: int) -> None:
    case = Case([num_tokens], 2, 1, 2 * half, torch.float32, seeded(seed))
    before = case.qkv.clone()
    case.run()
    case.cos_sin[:, half:] *= -1
    case.run()
    assert torch.allclose(case.qkv, before, atol=1e-5)


def test_a_batch_gives_each_sequence_what_it_gets_alone(generator: torch.Generator, dtype: torch.dtype) -> None:
    case = Case([4, 9, 1], 4, 2, 24, dtype, generator)
    alone = []
    for b in range(3):
        rows = slice(int(case.cu_seqlens[b]), int(case.cu_seqlens[b + 1]))
        qkv, cache = case.qkv[rows].clone(), case.kv_cache.clone()
        cu_seqlens = torch.tensor([0, case.lengths[b]], dtype=torch.int32)
        table = case.block_table[b : b + 1]
        places = case.positions[rows], case.cache_rows[rows]
        ops.rope_store(qkv, *places, case.cos_sin, cache, 0, table, cu_seqlens, 4, 2)
        alone.append(qkv)
    case.run(layer=0)
    assert torch.equal(case.qkv, torch.cat(alone))


@pytest.mark.parametrize("lengths", [[4, 9, 1], [0, 3, 0], []], ids=str)
def test_rows_behind_the_last_sequence_are_left_alone(
    generator: torch.Generator, dtype: torch.dtype, lengths: list[int]
) -> None:
    case = Case(lengths, 4, 2, 24, dtype, generator)
    plain = copy.deepcopy(case)
    plain.run(layer=1)
    case.qkv = torch.cat([case.qkv, poisoned((5, case.qkv.shape[1]), dtype)])
    nowhere = torch.full((5,), -7, dtype=torch.int32)
    case.positions, case.cache_rows = torch.cat([case.positions, nowhere]), torch.cat([case.cache_rows, nowhere])
    case.run(layer=1)
    assert torch.equal(case.qkv[:-5], plain.qkv) and case.qkv[-5:].isnan().all()
    assert_same(case.kv_cache, plain.kv_cache)


@pytest.mark.cpu_only
def test_bad_arguments_are_refused_by_name(generator: torch.Generator) -> None:
    good = Case([3, 2], 4, 2, 8, torch.float32, generator)
    num_blocks = good.kv_cache.shape[0]
    arguments = {
        "qkv": good.qkv, "positions": good.positions, "cache_rows": good.cache_rows, "cos_sin": good.cos_sin,
        "kv_cache": good.kv_cache, "layer_in_block": 1, "block_table": good.block_table, "cu_seqlens": good.cu_seqlens,
        "num_heads": 4, "num_kv_heads": 2,
    }  # fmt: skip
    used_block = int(good.cache_rows[0]) // good.block_size
    bad_table = good.block_table.clone()
    bad_table[0, used_block] = num_blocks
    negative_table = good.block_table.clone()
    negative_table[0, used_block] = -1

    norm = torch.ones(8)

    def rows(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    cases: list[tuple[dict[str, object], str]] = [
        ({"qkv": good.qkv[:, :-8]}, r"qkv has shape \[5, 56\], expected .*=64"),
        ({"qkv": good.qkv.half()}, "qkv has dtype float16"),
        ({"qkv": good.qkv.bfloat16()}, "kv_cache has dtype float32, expected bfloat16"),
        ({"qkv": good.qkv[:1].expand(5, 64)}, "rows of qkv overlap"),
        ({"positions": good.positions[:4]}, r"positions has shape \[4\], expected \[num_tokens=5\]"),
        ({"positions": good.positions.long()}, "positions has dtype int64, expected int32"),
        ({"positions": rows(0, 1, 2, 0, MAX_POSITIONS)}, r"positions\[4\] is 200, expected 0 to 199"),
        ({"positions": rows(0, -1, 2, 0, 1)}, r"positions\[1\] is -1, expected 0 to 199"),
        ({"cache_rows": good.cache_rows[:4]}, r"cache_rows has shape \[4\], expected \[num_tokens=5\]"),
        ({"cache_rows": good.cache_rows.long()}, "cache_rows has dtype int64, expected int32"),
        ({"cache_rows": rows(0, 1, 2, 0, 64)}, r"cache_rows\[4\] is 64, but block_table holds 16 blocks of 4 rows"),
        ({"cache_rows": rows(0, -1, 2, 0, 1)}, r"cache_rows\[1\] is -1, but block_table holds 16 blocks of 4 rows"),
        ({"cos_sin": good.cos_sin.bfloat16()}, "cos_sin has dtype bfloat16, expected float32"),
        ({"cos_sin": torch.zeros(64, 7)}, "cos_sin has head_dim=7, expected an even"),
        ({"cos_sin": torch.zeros(64, 0)}, "cos_sin has head_dim=0"),
        ({"cos_sin": good.cos_sin[:1]}, r"positions\[\d\] is \d+, expected 0 to 0"),
        ({"kv_cache": good.kv_cache[:, :, :1]}, r"kv_cache has shape .* expected .*2=2"),
        ({"kv_cache": good.kv_cache.transpose(0, 1)}, "kv_cache .* has stride"),
        ({"kv_cache": torch.zeros(num_blocks, 3, 2, 2, 0, 8)}, "block_size=0"),
        ({"layer_in_block": 3}, "layer_in_block is 3, expected 0 to 2"),
        ({"layer_in_block": -1}, "layer_in_block is -1"),
        ({"block_table": good.block_table[0]}, r"block_table has shape \[16\]"),
        ({"block_table": bad_table}, rf"block_table\[0\]\[{used_block}\] is {num_blocks}, expected 0 to"),
        ({"block_table": negative_table}, rf"block_table\[0\]\[{used_block}\] is -1, expected 0 to"),
        ({"block_table": good.block_table[:, :0].contiguous()}, "block_table holds 0 blocks of 4 rows"),
        ({"cu_seqlens": rows(0, 5)}, r"cu_seqlens has shape \[2\], expected \[num_seqs \+ 1=3\]"),
        ({"cu_seqlens": rows(0, 3, 6)}, r"cu_seqlens\[2\] is 6, expected at most num_tokens=5"),
        ({"cu_seqlens": rows(0, 6, 5)}, r"cu_seqlens\[2\] is 5, expected at least 6"),
        ({"cu_seqlens": rows(1, 3, 5)}, r"cu_seqlens\[0\] is 1"),
        ({"num_heads": 3}, "num_heads is 3, expected a multiple of num_kv_heads=2"),
        ({"num_heads": 2**40}, "num_heads is"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0, expected 1 to 4"),
        ({"qkv": good.kv_cache.flatten()[: 5 * 64].view(5, 64)}, "qkv shares memory with kv_cache"),
        ({"positions": good.qkv.view(torch.int32).flatten()[:5]}, "qkv shares memory with positions"),
        ({"cache_rows": good.kv_cache.view(torch.int32).flatten()[:5]}, "kv_cache shares memory with cache_rows"),
        ({"q_norm": norm}, "k_norm is None, expected a weight for queries and for keys"),
        ({"k_norm": norm}, "q_norm is None, expected a weight for queries and for keys"),
        ({"q_norm": norm, "k_norm": norm[:6]}, r"k_norm has shape \[6\], expected \[head_dim=8\]"),
        ({"q_norm": norm.bfloat16(), "k_norm": norm}, "q_norm has dtype bfloat16, expected float32"),
        ({"q_norm": norm.repeat(2)[::2], "k_norm": norm}, "q_norm has stride 2"),
        ({"q_norm": good.qkv[0, :8], "k_norm": norm}, "qkv shares memory with q_norm"),
        ({"q_norm": norm, "k_norm": good.kv_cache.flatten()[:8]}, "kv_cache shares memory with k_norm"),
        ({"q_norm": norm, "k_norm": norm, "eps": -1.0}, "eps is -1.0+, expected at least 0"),
    ]
    for change, message in cases:
        before = good.qkv.clone()
        with pytest.raises(KernelArgumentError, match=message):
            ops.rope_store(**{**arguments, **change})  # type: ignore[arg-type]
        assert torch.equal(good.qkv, before)
        assert good.kv_cache.isnan().all()


def test_padding_of_the_block_table_is_not_read(generator: torch.Generator) -> None:
    case = Case([2], 1, 1, 8, torch.float32, generator)
    used = {int(row) // case.block_size for row in case.cache_rows}
    for block in range(case.block_table.shape[1]):
        if block not in used:
            case.block_table[0, block] = -7
    case.run()
