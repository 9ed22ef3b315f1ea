"""Rounding to 8 bits and its way back: the bits of the CPU's reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import Guards, assert_near
from tests.cuda.emulated import KernelError, Kernels
from tests.ops.conftest import random_rows
from tests.ops.quantized_reference import dequantized, e4m3_numbers
from tests.ops.test_quantize import FORMS, FUNCTIONS, SUMS, assert_rounded, random_sums

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# One element; a warp's, a block's and several rounds of it; aligned and not.
SIZES = [(1, 1), (3, 16), (2, 37), (2, 2048), (3, 2056), (2, 5001), (1, 11008)]


@DTYPES
@FORMS
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (2, 1), (5, 16)], ids=str)
def test_quantize(
    kernels: Kernels,
    guards: Guards,
    generator: torch.Generator,
    dtype: torch.dtype,
    form: torch.dtype,
    size: tuple[int, int],
    padding: tuple[int, int],
) -> None:
    x = guards.put(random_rows(generator, size, dtype))
    out = guards.poisoned(size[0] + padding[0], size[1] + padding[1], dtype=form)
    scale = guards.poisoned(size[0], dtype=torch.float32)
    kernels.quantize(out, scale, x)
    assert_rounded(out, scale, x, form)


@DTYPES
@FORMS
def test_strided_rows_of_zeros_and_of_no_numbers(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, form: torch.dtype
) -> None:
    x = guards.put(random_rows(generator, (6, 96), dtype))[:, 16:80]
    x[1], x[2, 40], x[3, 0], x[4, 63] = 0.0, float("nan"), float("inf"), -float("inf")
    out, scale = guards.poisoned(32, 64, dtype=form), guards.poisoned(6, dtype=torch.float32)
    kernels.quantize(out, scale, x)
    assert_rounded(out, scale, x, form)


@FORMS
@pytest.mark.parametrize("largest", [1e-45, 4e-43, 1e-39, 3e38])
def test_rows_of_any_magnitude(kernels: Kernels, generator: torch.Generator, form: torch.dtype, largest: float) -> None:
    x = torch.rand(3, 50, generator=generator) * largest
    out, scale = torch.empty(3, 50, dtype=form), torch.empty(3)
    kernels.quantize(out, scale, x)
    assert_rounded(out, scale, x, form)


def test_every_number_of_e4m3_and_the_middle_between_two(kernels: Kernels) -> None:
    """Of the emulated conversion, whose rule is that of `cvt.rn.satfinite.e4m3x2.f32`."""
    numbers = torch.from_numpy(e4m3_numbers()).float()
    x = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, -numbers])[None].contiguous()
    out, scale = torch.empty(x.shape, dtype=torch.float8_e4m3fn), torch.empty(1)
    kernels.quantize(out, scale, x)
    assert scale.item() == 1
    assert_rounded(out, scale, x, torch.float8_e4m3fn)


def arguments(guards: Guards, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else guards.put(tensor) for tensor in tensors]


@DTYPES
@pytest.mark.parametrize(("size", "padding"), SUMS[1:], ids=str)
@pytest.mark.parametrize("kind", [torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_dequantize(
    kernels: Kernels,
    guards: Guards,
    generator: torch.Generator,
    dtype: torch.dtype,
    size: tuple[int, int],
    padding: tuple[int, int],
    kind: torch.dtype,
    with_bias: bool,
) -> None:
    sums, row_scale, scale = random_sums(generator, size, padding, kind)
    bias = random_rows(generator, size[1:], dtype) if with_bias else None
    out = guards.poisoned(*size, dtype=dtype)
    kernels.dequantize(out, *arguments(guards, sums, row_scale, scale, bias), None)
    assert torch.equal(out, dequantized(sums[: size[0], : size[1]], row_scale, scale, bias, dtype))


@DTYPES
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_dequantize_with_an_activation(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, kind: str
) -> None:
    sums, row_scale, scale = random_sums(generator, (5, 100), (27, 12), torch.int32)
    bias = random_rows(generator, (100,), dtype)
    out = guards.poisoned(5, 100, dtype=dtype)
    kernels.dequantize(out, *arguments(guards, sums, row_scale, scale, bias), kind)
    plain = sums[:5, :100].double() * row_scale.double()[:, None] * scale.double() + bias.double()
    assert_near(out, FUNCTIONS[kind](plain), 4.0 if dtype == torch.float32 else 1.0, 1e-6)


def test_what_is_refused(kernels: Kernels) -> None:
    x, scale = torch.zeros(2, 8), torch.zeros(2)
    with pytest.raises(KernelError, match=r"quantize: out has dtype uint8, expected int8 or float8_e4m3fn"):
        kernels.quantize(torch.zeros(2, 8, dtype=torch.uint8), scale, x)
    with pytest.raises(KernelError, match=r"dequantize: kind is 'relu'"):
        kernels.dequantize(torch.zeros(2, 8), x, scale, torch.zeros(8), None, "relu")
