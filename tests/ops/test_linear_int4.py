from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from dpn_rt.model.weights.tiles import GROUP, pack_int4
from tests.ops.conftest import CPU_ONLY, poisoned, random_rows, seeded
from tests.ops.quantized_cases import random_int4, tiled_scale
from tests.ops.quantized_reference import exact_product, int4_reference

DEVICES = CPU_ONLY

ROWS = [0, 1, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 31, 32, 33]
# (in_features, out_features): empty, one, and around lines of 8 columns, groups of 128, vectors and panels of rows
SIZES = [
    (0, 5), (8, 0), (1, 1), (4, 15), (5, 16), (8, 17), (9, 31), (127, 32), (128, 33), (129, 100), (1000, 16),
    (2047, 257),
]  # fmt: skip


def multiply(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    out = poisoned((x.shape[0], q.shape[0]), x.dtype)
    return ops.linear_int4(x, pack_int4(q), tiled_scale(scale), bias, out=out)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_bit_by_bit(generator: torch.Generator, dtype: torch.dtype, sizes: tuple[int, int], with_bias: bool) -> None:
    q, scale = random_int4(generator, sizes[1], sizes[0])
    bias = random_rows(generator, sizes[1:], dtype) if with_bias else None
    for rows in ROWS:
        x = random_rows(generator, (rows, sizes[0]), dtype)
        assert torch.equal(multiply(x, q, scale, bias), int4_reference(x, q, scale, bias)), f"{rows} rows"


@pytest.mark.parametrize("sizes", [(2048, 640), (5632, 200), (130, 7), (900, 1024), (833, 1024)], ids=str)
def test_many_rows(generator: torch.Generator, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    x = random_rows(generator, (640, sizes[0]), dtype)
    q, scale = random_int4(generator, sizes[1], sizes[0])
    assert torch.equal(multiply(x, q, scale), int4_reference(x, q, scale, None))


def test_the_product_of_the_rounded_rows(generator: torch.Generator, dtype: torch.dtype) -> None:
    x, bias = random_rows(generator, (9, 700), dtype), random_rows(generator, (50,), dtype)
    q, scale = random_int4(generator, 50, 700)
    dequantized = q.double() * scale.double().repeat_interleave(GROUP, dim=1)[:, :700]
    expected, magnitudes = exact_product(x, dequantized, bias)
    error = (multiply(x, q, scale, bias).double() - expected).abs()
    digits = 2**-8 if dtype == torch.bfloat16 else 2**-23
    assert (error <= digits * expected.abs() + 9 * 2**-24 * magnitudes).all()  # 6 groups, row scale, bias


@pytest.mark.parametrize("in_features", [11008, 131071])
def test_extremes_neither_saturate_nor_overflow(in_features: int) -> None:
    x = torch.tensor([[3.0], [-3.0]]).expand(2, in_features).contiguous()
    q = torch.tensor([[7], [-8]], dtype=torch.int8).expand(2, in_features).contiguous()
    scale = torch.ones(2, -(-in_features // GROUP), dtype=torch.bfloat16)
    out = multiply(x, q, scale)
    assert torch.equal(out, int4_reference(x, q, scale, None))
    expected = torch.tensor([[127.0], [-128.0]]) * torch.tensor([7.0, -8.0]) * in_features
    torch.testing.assert_close(out, expected * 3 / 127.5, rtol=1e-5, atol=0)


def test_rows_of_zeros_give_the_bias(generator: torch.Generator, dtype: torch.dtype) -> None:
    x, bias = random_rows(generator, (5, 140), dtype), random_rows(generator, (20,), dtype)
    x[1], x[3] = 0.0, -0.0
    q, scale = random_int4(generator, 20, 140)
    out = multiply(x, q, scale, bias)
    assert torch.equal(out[[1, 3]], bias.expand(2, 20))
    assert torch.equal(out, int4_reference(x, q, scale, bias))


@pytest.mark.parametrize("largest", [1e-45, 3e-44, 1e-39, 1e-30, 1e38])
def test_rows_of_any_magnitude(generator: torch.Generator, largest: float) -> None:
    x = torch.rand(3, 150, generator=generator) * largest
    q, scale = random_int4(generator, 20, 150)
    for rows in (x, x.bfloat16()):
        assert torch.equal(multiply(rows, q, scale), int4_reference(rows, q, scale, None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 17, 136])
def test_what_is_not_finite_stays_in_its_row(
    generator: torch.Generator, dtype: torch.dtype, bad: float, column: int
) -> None:
    x = random_rows(generator, (14, 137), dtype)
    q, scale = random_int4(generator, 19, 137)
    expected = multiply(x, q, scale)
    x[5, column] = bad
    out = multiply(x, q, scale)
    assert out[5].isnan().all()
    others = [i for i in range(14) if i != 5]
    assert torch.equal(out[others], expected[others])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    in_features=st.integers(1, 300),
    out_features=st.integers(1, 90),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_does_not_depend_on_its_batch(
    seed: int, rows: int, in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    generator = seeded(seed)
    x = random_rows(generator, (rows, in_features), dtype)
    q, scale = random_int4(generator, out_features, in_features)
    together = multiply(x, q, scale)
    assert torch.equal(together, int4_reference(x, q, scale, None))
    assert torch.equal(together, torch.cat([multiply(row[None], q, scale) for row in x]))
    order = torch.randperm(rows, generator=generator)
    assert torch.equal(multiply(x[order], q, scale), together[order])


@pytest.mark.parametrize("rows", [1, 8, 300])
def test_any_number_of_threads(generator: torch.Generator, dtype: torch.dtype, rows: int) -> None:
    x = random_rows(generator, (rows, 2048), dtype)
    q, scale = random_int4(generator, 1000, 2048)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(multiply(x, q, scale))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_strided_rows(generator: torch.Generator, dtype: torch.dtype) -> None:
    wide = random_rows(generator, (4, 290), dtype)
    q, scale = random_int4(generator, 6, 240)
    contiguous = multiply(wide[:, 25:265].contiguous(), q, scale)
    assert torch.equal(multiply(wide[:, 25:265], q, scale), contiguous)
    assert torch.equal(multiply(wide[1:2, 25:265].expand(4, 240), q, scale), contiguous[1:2].expand(4, 6))


def test_the_number_of_rows_that_tiles_leave_open(generator: torch.Generator) -> None:
    x = random_rows(generator, (3, 64), torch.float32)
    q, scale = random_int4(generator, 32, 64)
    tiles, scales, bias = pack_int4(q), tiled_scale(scale), torch.ones(21)
    assert torch.equal(ops.linear_int4(x, tiles, scales), int4_reference(x, q, scale, None))
    assert torch.equal(ops.linear_int4(x, tiles, scales, bias), int4_reference(x, q[:21], scale[:21], bias))


def test_bad_arguments_are_refused_by_name() -> None:
    x, bias = torch.zeros(2, 136), torch.zeros(20)
    weight = torch.full((2, 17, 16, 4), 0x88, dtype=torch.uint8)
    scale = torch.ones(2, 2, 16, dtype=torch.bfloat16)
    tiles = r"expected \[ceil\(out_features / 16\)=2, ceil\(in_features / 8\)=17, rows=16, bytes=4\]"
    scales = r"expected \[ceil\(out_features / 16\)=2, ceil\(in_features / 128\)=2, rows=16\]"
    cases = [
        (lambda: ops.linear_int4(x[0], weight, scale), r"x has shape \[136\], expected \[num_tokens, in_features\]"),
        (lambda: ops.linear_int4(x.half(), weight, scale), "x has dtype float16, expected float32 or bfloat16"),
        (lambda: ops.linear_int4(torch.zeros(2, 272)[:, ::2], weight, scale), "x has stride 2"),
        (lambda: ops.linear_int4(torch.zeros(0, 131072), weight, scale), "in_features is 131072, expected 0 to 131071"),
        (lambda: ops.linear_int4(x, weight[:1], scale, bias), rf"weight has shape \[1, 17, 16, 4\], {tiles}"),
        (lambda: ops.linear_int4(x[:, :128], weight, scale), r"weight has shape .* / 8\)=16"),
        (lambda: ops.linear_int4(x, weight.view(2, 17, 4, 16), scale), rf"weight has shape .*, {tiles}"),
        (lambda: ops.linear_int4(x, weight.to(torch.int8), scale), "weight has dtype .*, expected uint8"),
        (
            lambda: ops.linear_int4(x, weight.repeat(2, 1, 1, 1)[::2].repeat(1, 2, 1, 1)[:, ::2], scale),
            "weight .* stride",
        ),
        (lambda: ops.linear_int4(x, weight.to("meta"), scale), "weight is on "),
        (lambda: ops.linear_int4(x, weight, scale.float()), "scale has dtype float32, expected bfloat16"),
        (lambda: ops.linear_int4(x, weight, scale[:, :1]), rf"scale has shape \[2, 1, 16\], {scales}"),
        (lambda: ops.linear_int4(x, weight, scale[:1]), rf"scale has shape \[1, 2, 16\], {scales}"),
        (lambda: ops.linear_int4(x, weight, scale.transpose(1, 2)), rf"scale has shape \[2, 16, 2\], {scales}"),
        (lambda: ops.linear_int4(x, weight, scale.repeat(1, 2, 1)[:, ::2]), "scale .* has stride 32 in dimension 1"),
        (lambda: ops.linear_int4(x, weight, scale, bias[:3]), r"weight has shape .*16\)=1"),
        (lambda: ops.linear_int4(x, weight, scale, bias[:, None]), r"bias has shape \[20, 1\]"),
        (lambda: ops.linear_int4(x, weight, scale, bias.bfloat16()), "bias has dtype bfloat16, expected float32"),
        (lambda: ops.linear_int4(x, weight, scale, bias, out=torch.zeros(2, 21)), r"bias has shape \[20\]"),
        (lambda: ops.linear_int4(x, weight, scale, out=torch.zeros(2, 5)), r"weight has shape .*16\)=1"),
        (lambda: ops.linear_int4(x, weight, scale, out=torch.zeros(2, 20).bfloat16()), "out has dtype bfloat16"),
        (lambda: ops.linear_int4(x, weight, scale, out=torch.zeros(2, 40)[:, :20]), "out .* has stride 40"),
        (lambda: ops.linear_int4(x[:1], weight, scale, bias, out=bias[None]), "out shares memory with bias"),
        (lambda: ops.linear_int4(x[:1], weight, scale, out=x[:1, :20]), "out shares memory with x"),
        (lambda: ops.linear_int4(x, weight, 1.0), "scale is of type float, expected a tensor"),  # type: ignore[arg-type]
    ]
    for call, message in cases:
        with pytest.raises(KernelArgumentError, match=f"^linear_int4: {message}"):
            call()
