from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from dpn_rt.model.weights.tiles import pack_int8
from tests.ops.conftest import CPU_ONLY, poisoned, random_rows, seeded
from tests.ops.quantized_cases import random_int8
from tests.ops.quantized_reference import exact_product, int8_reference

DEVICES = CPU_ONLY

ROWS = [0, 1, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 31, 32, 33]
# (in_features, out_features): empty, one, and around quads of columns, vectors and panels of rows
SIZES = [
    (0, 5),
    (8, 0),
    (1, 1),
    (3, 15),
    (4, 16),
    (5, 17),
    (33, 31),
    (64, 32),
    (65, 49),
    (129, 33),
    (1000, 100),
    (2047, 257),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_bit_by_bit(generator: torch.Generator, dtype: torch.dtype, sizes: tuple[int, int], with_bias: bool) -> None:
    q, scale = random_int8(generator, sizes[1], sizes[0])
    bias = random_rows(generator, sizes[1:], dtype) if with_bias else None
    packed = pack_int8(q)
    for rows in ROWS:
        x = random_rows(generator, (rows, sizes[0]), dtype)
        out = ops.linear_int8(x, packed, scale, bias, out=poisoned((rows, sizes[1]), dtype))
        assert torch.equal(out, int8_reference(x, q, scale, bias)), f"{rows} rows"


@pytest.mark.parametrize("sizes", [(2048, 640), (5632, 200), (130, 7), (900, 1024), (833, 1024)], ids=str)
def test_many_rows(generator: torch.Generator, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    x = random_rows(generator, (640, sizes[0]), dtype)
    q, scale = random_int8(generator, sizes[1], sizes[0])
    out = ops.linear_int8(x, pack_int8(q), scale)
    assert torch.equal(out, int8_reference(x, q, scale, None))


def test_the_product_of_the_rounded_rows(generator: torch.Generator, dtype: torch.dtype) -> None:
    x, bias = random_rows(generator, (9, 700), dtype), random_rows(generator, (50,), dtype)
    q, scale = random_int8(generator, 50, 700)
    expected, magnitudes = exact_product(x, q.double() * scale.double()[:, None], bias)
    error = (ops.linear_int8(x, pack_int8(q), scale, bias).double() - expected).abs()
    digits = 2**-8 if dtype == torch.bfloat16 else 2**-23
    assert (error <= digits * expected.abs() + 4 * 2**-24 * magnitudes).all()


@pytest.mark.parametrize("in_features", [11008, 131071])
def test_extremes_neither_saturate_nor_overflow(in_features: int) -> None:
    signs = torch.tensor([[1.0], [-1.0]])
    x = (signs * torch.ones(2, in_features)) * 3.0
    q = torch.tensor([[127], [-127], [-128]], dtype=torch.int8).expand(3, in_features).contiguous()
    scale = torch.ones(3)
    expected = torch.tensor([127.0, -127.0, -128.0]) * torch.tensor([[127.0], [-128.0]]) * in_features
    assert torch.equal(ops.linear_int8(x, pack_int8(q), scale), int8_reference(x, q, scale, None))
    torch.testing.assert_close(ops.linear_int8(x, pack_int8(q), scale), expected * 3 / 127.5, rtol=1e-6, atol=0)
    mixed = torch.where(torch.arange(in_features) % 2 == 0, 127, -127).to(torch.int8)[None]
    assert torch.equal(
        ops.linear_int8(mixed.float(), pack_int8(mixed), scale[:1]),
        int8_reference(mixed.float(), mixed, scale[:1], None),
    )


def test_ties_go_to_even(dtype: torch.dtype) -> None:
    x = torch.tensor([[-127.5, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.5]]).to(dtype)
    q = torch.eye(8, dtype=torch.int8)
    out = ops.linear_int8(x, pack_int8(q), torch.ones(8))
    assert out.tolist() == [[-128.0, 0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 127.0]]


def test_rows_of_zeros_give_the_bias(generator: torch.Generator, dtype: torch.dtype) -> None:
    x, bias = random_rows(generator, (5, 40), dtype), random_rows(generator, (20,), dtype)
    x[1], x[3] = 0.0, -0.0
    q, scale = random_int8(generator, 20, 40)
    out = ops.linear_int8(x, pack_int8(q), scale, bias)
    assert torch.equal(out[[1, 3]], bias.expand(2, 20))
    assert torch.equal(out, int8_reference(x, q, scale, bias))


@pytest.mark.parametrize("largest", [1e-45, 3e-44, 1e-39, 1e-30, 3e38])
def test_rows_of_any_magnitude(generator: torch.Generator, largest: float) -> None:
    x = torch.rand(3, 50, generator=generator) * largest
    q, scale = random_int8(generator, 20, 50)
    assert torch.equal(ops.linear_int8(x, pack_int8(q), scale), int8_reference(x, q, scale, None))
    half = x.bfloat16()
    assert torch.equal(ops.linear_int8(half, pack_int8(q), scale), int8_reference(half, q, scale, None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 17, 36])
def test_what_is_not_finite_stays_in_its_row(
    generator: torch.Generator, dtype: torch.dtype, bad: float, column: int
) -> None:
    x = random_rows(generator, (14, 37), dtype)
    q, scale = random_int8(generator, 19, 37)
    expected = ops.linear_int8(x, pack_int8(q), scale)
    x[5, column] = bad
    out = ops.linear_int8(x, pack_int8(q), scale)
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
    q, scale = random_int8(generator, out_features, in_features)
    tiles = pack_int8(q)
    together = ops.linear_int8(x, tiles, scale)
    assert torch.equal(together, int8_reference(x, q, scale, None))
    assert torch.equal(together, torch.cat([ops.linear_int8(row[None], tiles, scale) for row in x]))
    order = torch.randperm(rows, generator=generator)
    assert torch.equal(ops.linear_int8(x[order], tiles, scale), together[order])


@pytest.mark.parametrize("rows", [1, 8, 300])
def test_any_number_of_threads(generator: torch.Generator, dtype: torch.dtype, rows: int) -> None:
    x = random_rows(generator, (rows, 1024), dtype)
    q, scale = random_int8(generator, 1000, 1024)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(ops.linear_int8(x, pack_int8(q), scale))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_strided_rows(generator: torch.Generator, dtype: torch.dtype) -> None:
    wide = random_rows(generator, (4, 90), dtype)
    q, scale = random_int8(generator, 6, 40)
    tiles = pack_int8(q)
    contiguous = ops.linear_int8(wide[:, 25:65].contiguous(), tiles, scale)
    assert torch.equal(ops.linear_int8(wide[:, 25:65], tiles, scale), contiguous)
    repeated = ops.linear_int8(wide[1:2, 25:65].expand(4, 40), tiles, scale)
    assert torch.equal(repeated, contiguous[1:2].expand(4, 6))


def test_bad_arguments_are_refused_by_name() -> None:
    x, scale, bias = torch.zeros(2, 8), torch.ones(20), torch.zeros(20)
    weight = torch.full((2, 2, 16, 4), 128, dtype=torch.uint8)
    shape = r"expected \[ceil\(out_features / 16\)=2, ceil\(in_features / 4\)=2, rows=16, columns=4\]"
    cases = [
        (lambda: ops.linear_int8(x[0], weight, scale), r"x has shape \[8\], expected \[num_tokens, in_features\]"),
        (lambda: ops.linear_int8(x.half(), weight, scale), "x has dtype float16, expected float32 or bfloat16"),
        (lambda: ops.linear_int8(torch.zeros(2, 16)[:, ::2], weight, scale), "x has stride 2"),
        (lambda: ops.linear_int8(torch.zeros(0, 131072), weight, scale), "in_features is 131072, expected 0 to 131071"),
        (lambda: ops.linear_int8(x, weight[:1], scale), rf"weight has shape \[1, 2, 16, 4\], {shape}"),
        (lambda: ops.linear_int8(x[:, :4], weight, scale), r"weight has shape .* / 4\)=1"),
        (lambda: ops.linear_int8(x, weight.view(2, 2, 4, 16), scale), rf"weight has shape \[2, 2, 4, 16\], {shape}"),
        (lambda: ops.linear_int8(x, weight.flatten(1), scale), rf"weight has shape \[2, 128\], {shape}"),
        (lambda: ops.linear_int8(x, weight.to(torch.int8), scale), "weight has dtype .*, expected uint8"),
        (lambda: ops.linear_int8(x, weight.float(), scale), "weight has dtype float32, expected uint8"),
        (
            lambda: ops.linear_int8(x, weight.repeat(1, 2, 1, 1)[:, ::2], scale),
            "weight .* has stride 128 in dimension 1, expected 64",
        ),
        (lambda: ops.linear_int8(x, weight.to("meta"), scale), "weight is on "),
        (lambda: ops.linear_int8(x, weight, scale.bfloat16()), "scale has dtype bfloat16, expected float32"),
        (lambda: ops.linear_int8(x, weight, scale[:, None]), r"scale has shape \[20, 1\], expected \[out_features\]"),
        (lambda: ops.linear_int8(x, weight, torch.ones(40)[::2]), "scale has stride 2"),
        (lambda: ops.linear_int8(x, weight, scale, bias[:3]), r"bias has shape \[3\], expected \[out_features=20\]"),
        (lambda: ops.linear_int8(x, weight, scale, bias.bfloat16()), "bias has dtype bfloat16, expected float32"),
        (lambda: ops.linear_int8(x, weight, scale, out=torch.zeros(2, 5)), r"out has shape \[2, 5\]"),
        (lambda: ops.linear_int8(x, weight, scale, out=torch.zeros(2, 20).bfloat16()), "out has dtype bfloat16"),
        (lambda: ops.linear_int8(x, weight, scale, out=torch.zeros(2, 40)[:, :20]), "out .* has stride 40"),
        (lambda: ops.linear_int8(x[:1], weight, scale, out=scale[None]), "out shares memory with scale"),
        (lambda: ops.linear_int8(x[:1], weight, scale, bias, out=bias[None]), "out shares memory with bias"),
        (lambda: ops.linear_int8(x, weight, [1.0]), "scale is of type float, expected a tensor"),  # type: ignore[arg-type]
    ]
    for call, message in cases:
        with pytest.raises(KernelArgumentError, match=f"^linear_int8: {message}"):
            call()


def test_out_may_share_no_memory_with_the_rows() -> None:
    x = torch.zeros(2, 8)
    weight = torch.full((1, 2, 16, 4), 128, dtype=torch.uint8)
    with pytest.raises(KernelArgumentError, match="linear_int8: out shares memory with x"):
        ops.linear_int8(x, weight, torch.ones(8), out=x)
    with pytest.raises(KernelArgumentError, match="linear_int8: out shares memory with weight"):
        ops.linear_int8(x, weight, torch.ones(8), out=weight.view(torch.float32).view(-1)[:16].view(2, 8))
