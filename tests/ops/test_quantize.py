from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from dpn_rt.schema.activation import Activation
from tests.ops.conftest import assert_close_to_reference, poisoned, random_rows
from tests.ops.quantized_reference import dequantized, e4m3_numbers, e4m3_rows, quantized_rows

FORMS = pytest.mark.parametrize("form", [torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])
SIZES = [(0, 8), (1, 1), (1, 5), (3, 16), (7, 17), (2, 100), (5, 1000), (33, 64), (2, 4099)]
FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def expected_bytes(x: Tensor, form: torch.dtype) -> tuple[Tensor, Tensor]:
    q, scales = (quantized_rows if form == torch.int8 else e4m3_rows)(x.cpu())
    return torch.from_numpy(q.astype(np.int8 if form == torch.int8 else np.uint8)).view(torch.uint8), torch.from_numpy(
        scales
    )


def poisoned_bytes(shape: tuple[int, ...], form: torch.dtype) -> Tensor:
    return torch.full(shape, 0x7E, dtype=torch.uint8).view(form)


def assert_rounded(q: Tensor, scale: Tensor, x: Tensor, form: torch.dtype) -> None:
    expected, scales = expected_bytes(x, form)
    assert torch.equal(scale.cpu().isnan(), scales.isnan()) and torch.equal(
        scale.cpu().nan_to_num(), scales.nan_to_num()
    )
    rows, columns = expected.shape
    stored = q.cpu().view(torch.uint8)
    assert torch.equal(stored[:rows, :columns], expected)
    assert not stored[rows:].any() and not stored[:, columns:].any()


@FORMS
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (29, 15)], ids=str)
def test_bit_by_bit(
    generator: torch.Generator, dtype: torch.dtype, form: torch.dtype, size: tuple[int, int], padding: tuple[int, int]
) -> None:
    x = random_rows(generator, size, dtype)
    shape = (size[0] + padding[0], size[1] + padding[1])
    out, scale = poisoned_bytes(shape, form), poisoned(size[:1], torch.float32)
    q, s = ops.quantize(x, form, out=out, scale=scale)
    assert q is out and s is scale
    assert_rounded(q, s, x, form)
    again = ops.quantize(x, form, num_rows=shape[0], columns=shape[1])
    assert again[0].dtype == form and again[0].shape == shape
    assert torch.equal(again[0].view(torch.uint8), out.view(torch.uint8)) and torch.equal(again[1], scale)


@FORMS
def test_rows_that_are_strided_zero_or_not_finite(
    generator: torch.Generator, dtype: torch.dtype, form: torch.dtype
) -> None:
    x = random_rows(generator, (9, 90), dtype)[:, 25:65]
    x[1], x[3] = 0.0, -0.0
    x[4, 7], x[5, 39], x[6, 0] = float("nan"), float("inf"), -float("inf")
    q, scale = ops.quantize(x, form)
    assert_rounded(q, scale, x, form)
    assert scale[4:7].isnan().all() and not q[4:7].view(torch.uint8).any()
    assert not scale[[1, 3]].any()


@FORMS
@pytest.mark.parametrize("largest", [1e-45, 4e-43, 1e-39, 1e-30, 1.0, 3e38])
def test_rows_of_any_magnitude(generator: torch.Generator, form: torch.dtype, largest: float) -> None:
    x = torch.rand(3, 50, generator=generator) * largest
    assert_rounded(*ops.quantize(x, form), x, form)


def test_every_number_of_e4m3_and_the_middle_between_two() -> None:
    numbers = torch.from_numpy(e4m3_numbers()).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    around = torch.cat([numbers, middles, middles * (1 - 2**-20), middles * (1 + 2**-20)])
    x = torch.stack([around, -around]).to(torch.get_default_device())  # the largest is 448, so the scale is 1
    q, scale = ops.quantize(x, torch.float8_e4m3fn)
    assert scale.tolist() == [1.0, 1.0]
    codes, rounded = torch.arange(127, dtype=torch.uint8, device="cpu"), q[0].cpu().view(torch.uint8)
    assert torch.equal(rounded[:127], codes)
    assert torch.equal(rounded[127:253], torch.where(codes[:-1] % 2 == 0, codes[:-1], codes[1:]))
    assert_rounded(q, scale, x, torch.float8_e4m3fn)


SUMS = [
    ((0, 5), (0, 0)),
    ((1, 1), (31, 15)),
    ((3, 17), (29, 15)),
    ((5, 64), (0, 0)),
    ((33, 1028), (0, 12)),
    ((2, 5), (0, 3)),
]


def random_sums(
    generator: torch.Generator, size: tuple[int, int], padding: tuple[int, int], kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums with what is not to be read beside them, and both scales."""
    sums = torch.full((size[0] + padding[0], size[1] + padding[1]), 2**30, dtype=torch.int32)
    sums[: size[0], : size[1]] = torch.randint(-(2**24) * 9, 2**24 * 9, size, generator=generator, dtype=torch.int32)
    row_scale, scale = (torch.rand(count, generator=generator) * 2e-4 for count in size)
    return sums.to(kind), row_scale, scale


@pytest.mark.parametrize(("size", "padding"), SUMS, ids=str)
@pytest.mark.parametrize("kind", [torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_dequantize_bit_by_bit(
    generator: torch.Generator,
    dtype: torch.dtype,
    size: tuple[int, int],
    padding: tuple[int, int],
    kind: torch.dtype,
    with_bias: bool,
) -> None:
    sums, row_scale, scale = random_sums(generator, size, padding, kind)
    bias = random_rows(generator, size[1:], dtype) if with_bias else None
    out = ops.dequantize(sums, row_scale, scale, bias, out=poisoned(size, dtype))
    used = sums[: size[0], : size[1]].cpu()
    expected = dequantized(used, row_scale.cpu(), scale.cpu(), None if bias is None else bias.cpu(), dtype)
    assert torch.equal(out.cpu(), expected)
    assert torch.equal(ops.dequantize(sums, row_scale, scale, bias, dtype=dtype), out)


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("columns", [16, 37])
def test_dequantize_with_an_activation(
    generator: torch.Generator, dtype: torch.dtype, kind: Activation, columns: int
) -> None:
    sums, row_scale, scale = random_sums(generator, (7, columns), (1, 3), torch.int32)
    bias = random_rows(generator, (columns,), dtype)
    plain = sums[:7, :columns].double() * row_scale.double()[:, None] * scale.double() + bias.double()
    out = ops.dequantize(sums, row_scale, scale, bias, kind, out=poisoned((7, columns), dtype))
    assert_close_to_reference(out, FUNCTIONS[kind](plain), FUNCTIONS[kind](plain.float()).to(dtype), floor=1e-5)


def test_a_row_without_a_scale_is_nan(generator: torch.Generator, dtype: torch.dtype) -> None:
    sums, row_scale, scale = random_sums(generator, (4, 20), (0, 0), torch.int32)
    row_scale[2], sums[2] = float("nan"), 0
    for kind in (None, *FUNCTIONS):
        out = ops.dequantize(sums, row_scale, scale, None, kind, dtype=dtype)
        assert out[2].isnan().all() and not out[[0, 1, 3]].isnan().any()


def test_the_dtype_of_the_result() -> None:
    sums, row_scale, scale = torch.ones(2, 3), torch.ones(2), torch.ones(3)
    assert ops.dequantize(sums, row_scale, scale).dtype == torch.float32
    assert ops.dequantize(sums, row_scale, scale, torch.ones(3).bfloat16()).dtype == torch.bfloat16


@pytest.mark.cpu_only
def test_bad_arguments_of_quantize() -> None:
    x, out, scale = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.int8), torch.zeros(2)
    cases = [
        (lambda: ops.quantize(x[0], torch.int8), r"x has shape \[8\], expected \[num_tokens, in_features\]"),
        (lambda: ops.quantize(x.double(), torch.int8), "x has dtype float64, expected float32 or bfloat16"),
        (lambda: ops.quantize(torch.zeros(2, 16)[:, ::2], torch.int8), "x has stride 2"),
        (lambda: ops.quantize(x, torch.uint8), "out has dtype uint8, expected int8 or float8_e4m3fn"),
        (lambda: ops.quantize(x, torch.float8_e5m2), "out has dtype an unsupported dtype, expected int8 or float8"),
        (lambda: ops.quantize(x, torch.int8, num_rows=1), r"out has shape \[1, 8\], expected at least \[num_tokens=2"),
        (
            lambda: ops.quantize(x, torch.int8, columns=7),
            r"out has shape \[2, 7\], expected at least .*in_features=8\]",
        ),
        (lambda: ops.quantize(x, torch.int8, out=out[:, :4]), "out .* has stride 8 in dimension 0, expected 4"),
        (lambda: ops.quantize(x, torch.int8, scale=scale[:1]), r"scale has shape \[1\], expected \[num_tokens=2"),
        (lambda: ops.quantize(x, torch.int8, scale=scale.bfloat16()), "scale has dtype bfloat16, expected float32"),
        (lambda: ops.quantize(x, torch.int8, out=x.view(torch.int8)), "out shares memory with x"),
        (lambda: ops.quantize(x, torch.int8, scale=x[0, :2]), "scale shares memory with x"),
        (
            lambda: ops.quantize(x[:, :4], torch.int8, out=scale.view(torch.int8).view(2, 4), scale=scale),
            "out shares mem",
        ),
        (lambda: ops.quantize([1.0], torch.int8), "x is of type float, expected a tensor"),  # type: ignore[arg-type]
        (lambda: ops.quantize(x.to("meta"), torch.int8), "x is on an unsupported device"),
    ]
    for call, message in cases:
        with pytest.raises(KernelArgumentError, match=f"^quantize: {message}"):
            call()


@pytest.mark.cpu_only
def test_bad_arguments_of_dequantize() -> None:
    sums, row_scale, scale = torch.zeros(2, 8, dtype=torch.int32), torch.ones(2), torch.ones(8)
    cases = [
        (lambda: ops.dequantize(sums[0], row_scale, scale), r"sums has shape \[8\], expected \[num_rows, columns\]"),
        (lambda: ops.dequantize(sums.long(), row_scale, scale), "sums has dtype int64, expected int32 or float32"),
        (lambda: ops.dequantize(sums[:, :4], row_scale, scale[:4]), "sums .* has stride 8"),
        (
            lambda: ops.dequantize(sums, torch.ones(3), scale),
            r"sums has shape \[2, 8\], expected at least \[num_tokens=3",
        ),
        (lambda: ops.dequantize(sums, row_scale, torch.ones(9)), r"sums has shape .* out_features=9\]"),
        (lambda: ops.dequantize(sums, row_scale.double(), scale), "row_scale has dtype float64, expected float32"),
        (lambda: ops.dequantize(sums, row_scale, scale.bfloat16()), "scale has dtype bfloat16, expected float32"),
        (lambda: ops.dequantize(sums, row_scale[:, None], scale), r"row_scale has shape \[2, 1\]"),
        (lambda: ops.dequantize(sums, row_scale, scale, torch.ones(7)), r"bias has shape \[7\], expected \[out_feat"),
        (
            lambda: ops.dequantize(sums, row_scale, scale, torch.ones(8).half()),
            "out has dtype float16, expected float32",
        ),
        (
            lambda: ops.dequantize(sums, row_scale, scale, torch.ones(8), dtype=torch.bfloat16),
            "bias has dtype float32, expected bfloat16",
        ),
        (lambda: ops.dequantize(sums, row_scale, scale, None, "relu"), "kind is 'relu', expected 'quick_gelu'"),  # type: ignore[arg-type]
        (lambda: ops.dequantize(sums, row_scale, scale, out=torch.zeros(2, 9)), r"out has shape \[2, 9\]"),
        (lambda: ops.dequantize(sums, row_scale, scale, out=sums.view(torch.float32)), "out shares memory with sums"),
        (lambda: ops.dequantize(sums[:1], row_scale[:1], scale, out=scale[None]), "out shares memory with scale"),
        (
            lambda: ops.dequantize(sums[:1], row_scale[:1], scale, bias := torch.ones(8), out=bias[None]),
            "out shares memory with bias",
        ),
    ]
    for call, message in cases:
        with pytest.raises(KernelArgumentError, match=f"^dequantize: {message}"):
            call()
