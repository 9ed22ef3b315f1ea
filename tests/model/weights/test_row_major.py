"""Matrices in 8 bits as a GPU has them: on the CPU, the same objects with the CPU's products of torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dpn_rt.model.linear import load_linear
from dpn_rt.model.weights.forms import load_weight, place
from dpn_rt.model.weights.fp8 import FP8, Fp8Weight
from dpn_rt.model.weights.int4 import Int4Weight
from dpn_rt.model.weights.int8 import Int8Weight
from dpn_rt.model.weights.row_major import aligned
from dpn_rt.model.weights.table import EmbeddingTable
from dpn_rt.model.weights.weight import QuantizedWeight
from dpn_rt.schema.activation import ProductActivation
from tests.model.weights.test_quantized import assert_as_specified
from tests.ops.activation_reference import ACTIVATIONS
from tests.ops.quantized_reference import e4m3_numbers, e4m3_rows

CPU = torch.device("cpu")
ROWS = [0, 1, 2, 15, 16, 17, 31, 32, 33, 100]
# (out_features, in_features): multiples of 16 and not
SIZES = [(1, 1), (16, 16), (17, 33), (31, 8), (64, 200), (100, 1152)]
FORMS = pytest.mark.parametrize("form", [Int8Weight, Fp8Weight], ids=["int8", "fp8"])
SIZES_OF = pytest.mark.parametrize("size", SIZES, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def stored(form: type[QuantizedWeight], matrix: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
    """Of a layer "m" in an engine."""
    tensors = {f"m.{suffix}": tensor for suffix, tensor in form.quantize(matrix).items()}
    return tensors if bias is None else tensors | {"m.bias": bias}


def on_gpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: place(tensors, name, CPU, row_major=True, dtype=torch.float32) for name in tensors}


def on_cpu(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: place(tensors, name, CPU, row_major=False, dtype=dtype) for name in tensors}


@pytest.fixture(autouse=True)
def limits_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's products refuse here what they refuse on a GPU (aten/src/ATen/native/cuda/Blas.cpp)."""
    multiply, multiply_floats = torch._int_mm, torch._scaled_mm

    def check(x: Tensor, weight: Tensor, multiple: int) -> None:
        assert x.is_contiguous() and weight.stride() == (1, weight.shape[0]), "rows times columns"
        assert x.shape[1] % multiple == 0 and weight.shape[1] % multiple == 0 and 0 not in weight.shape

    def int_mm(x: Tensor, weight: Tensor) -> Tensor:
        check(x, weight, 8)
        assert x.shape[0] > 16
        return multiply(x, weight)

    def scaled_mm(x: Tensor, weight: Tensor, one: Tensor, other: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        check(x, weight, 16)
        assert one.numel() == other.numel() == 1 and one.dtype == other.dtype == torch.float32
        return multiply_floats(x, weight, one, other, out_dtype=out_dtype)

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)


@SIZES_OF
@DTYPES
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_int8_gives_the_bits_of_the_cpu(size: tuple[int, int], dtype: torch.dtype, with_bias: bool) -> None:
    bias = torch.randn(size[0]).to(dtype) if with_bias else None
    tensors = stored(Int8Weight, torch.randn(size), bias)
    gpu, cpu = (load_linear(each, "m", prepack=False) for each in (on_gpu(tensors), tensors))
    for count in ROWS:
        x = torch.randn(count, size[1]).to(dtype)
        x[count // 2 : count // 2 + 1] = 0
        x[1:2, -1] = float("nan")
        out = gpu(x)
        torch.testing.assert_close(out, cpu(x), rtol=0, atol=0, equal_nan=True)
        assert out.is_contiguous() and out.shape == (count, size[0])


def exact_fp8(x: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The product of the rounded rows with the stored weight in float64, and the magnitude of its terms."""
    numbers = torch.from_numpy(e4m3_numbers())
    numbers = torch.cat([numbers, torch.zeros(1), -numbers, torch.zeros(1)])
    codes, scales = e4m3_rows(x)
    rows = numbers[torch.from_numpy(codes).long()] * torch.from_numpy(scales).double()[:, None]
    weight = numbers[tensors["m.fp8"].view(torch.uint8).long()] * tensors["m.scale"].double()[:, None]
    return rows @ weight.T, rows.abs() @ weight.abs().T


@SIZES_OF
@DTYPES
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_fp8_is_the_product_of_the_rounded_rows(size: tuple[int, int], dtype: torch.dtype, with_bias: bool) -> None:
    bias = torch.randn(size[0]).to(dtype) if with_bias else None
    tensors = stored(Fp8Weight, torch.randn(size), bias)
    linear = load_linear(on_gpu(tensors), "m", prepack=False)
    for count in ROWS:
        x = torch.randn(count, size[1]).to(dtype)
        x[count // 2 : count // 2 + 1] = 0
        out, (expected, magnitudes) = linear(x), exact_fp8(x, tensors)
        if bias is not None:
            expected, magnitudes = expected + bias.double(), magnitudes + bias.double().abs()
        digits = 2**-8 if dtype == torch.bfloat16 else 2**-23
        bound = digits * expected.abs() + (4 + size[1]) * 2**-24 * magnitudes
        assert out.dtype == dtype and out.shape == (count, size[0]) and out.is_contiguous()
        assert ((out.double() - expected).abs() <= bound).all()


@FORMS
def test_what_is_not_finite_stays_in_its_row(form: type[QuantizedWeight]) -> None:
    linear = load_linear(on_gpu(stored(form, torch.randn(40, 48))), "m", prepack=False)
    x = torch.randn(20, 48)
    expected = linear(x)
    for row, bad in ((3, float("nan")), (4, float("inf")), (19, -float("inf"))):
        x[row, 5] = bad
    out = linear(x)
    assert out[[3, 4, 19]].isnan().all()
    others = [row for row in range(20) if row not in (3, 4, 19)]
    torch.testing.assert_close(out[others], expected[others], rtol=1e-5, atol=1e-5)


@FORMS
def test_a_batch_equals_each_row_alone(form: type[QuantizedWeight]) -> None:
    linear = load_linear(on_gpu(stored(form, torch.randn(40, 100))), "m", prepack=False)
    x = torch.randn(50, 100)
    together, alone = linear(x), torch.cat([linear(row[None]) for row in x])
    if form is Int8Weight:
        assert torch.equal(together, alone), "sums are exact"
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@FORMS
@pytest.mark.parametrize("rows", [slice(None), slice(0, 32), slice(16, 48), slice(5, 30), slice(60, 64)])
def test_parts_of_a_fused_matrix(form: type[QuantizedWeight], rows: slice) -> None:
    tensors = on_gpu(stored(form, torch.randn(64, 200), torch.randn(64)))
    x = torch.randn(3, 200)
    whole = load_linear(tensors, "m", prepack=False)(x)
    part = load_linear(tensors, "m", prepack=False, rows=rows)(x)
    torch.testing.assert_close(part, whole[:, rows], rtol=0, atol=0 if form is Int8Weight else 1e-5)


@FORMS
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_of_the_product(form: type[QuantizedWeight], kind: ProductActivation) -> None:
    tensors, x = on_gpu(stored(form, torch.randn(32, 300), torch.randn(32))), torch.randn(5, 300)
    plain = load_linear(tensors, "m", prepack=False)(x)
    activated = load_linear(tensors, "m", prepack=False, activation=kind)(x)
    torch.testing.assert_close(activated, ACTIVATIONS[kind](plain), rtol=1e-6, atol=1e-5)


@FORMS
def test_aligned_tensors_are_not_copied(form: type[QuantizedWeight]) -> None:
    tensors = on_gpu(stored(form, torch.randn(32, 64)))
    matrix = tensors[f"m.{form.suffix}"]
    assert aligned(matrix).data_ptr() == matrix.data_ptr() and matrix.shape == (32, 64)
    linear, x = load_linear(tensors, "m", prepack=True), torch.randn(2, 64)
    assert linear(x).any()
    matrix.view(torch.uint8).zero_()
    assert not linear(x).any()
    assert load_weight(tensors, "m", prepack=False).num_bytes == sum(each.nbytes for each in tensors.values())


@FORMS
@DTYPES
@pytest.mark.parametrize("columns", [1, 4, 63, 64])
def test_rows_of_a_table(form: type[QuantizedWeight], dtype: torch.dtype, columns: int) -> None:
    tensors, ids = stored(form, torch.randn(37, columns)), torch.tensor([36, 0, 5, 15, 16, 16, 31, 32])
    table = EmbeddingTable(on_gpu(tensors), "m", columns, dtype)
    expected = EmbeddingTable(on_cpu(tensors, dtype), "m", columns, dtype)
    for index in (ids, ids.int(), ids[:1], ids[:0]):
        rows = table.rows(index)
        assert rows.dtype == dtype and rows.is_contiguous() and torch.equal(rows, expected.rows(index))


@pytest.mark.parametrize("columns", [1, 7, 128, 300])
def test_fp8_is_half_a_step_off_at_most(columns: int) -> None:
    weight = torch.randn(21, columns)
    weight[3], weight[4] = 0, 1e-30
    tensors = Fp8Weight.quantize(weight)
    assert_as_specified(Fp8Weight, tensors, 21, columns)
    error = (tensors["fp8"].float() * tensors["scale"][:, None] - weight).abs()
    smallest = weight.abs().amax(1, keepdim=True) / 448 * 2**-10  # half of the least step
    assert (error <= torch.maximum(weight.abs() / 16, smallest) * (1 + 1e-5)).all()
    assert torch.equal(tensors["fp8"][3].view(torch.uint8), torch.zeros(columns, dtype=torch.uint8))


@DTYPES
def test_given_scales_find_every_number_again(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(16, 1)
    scale = torch.rand(16) + 0.01
    scale[3] *= -1
    weight = codes.view(FP8).float() * scale[:, None]
    tensors = Fp8Weight.quantize(weight.to(dtype), scale)
    assert torch.equal(tensors["fp8"].view(torch.uint8), codes) and torch.equal(tensors["scale"], scale)


@DTYPES
def test_fp8_on_a_cpu_is_dense(dtype: torch.dtype) -> None:
    bias = torch.randn(50).to(dtype)
    tensors = stored(Fp8Weight, torch.randn(50, 70), bias)
    dense = (tensors["m.fp8"].float() * tensors["m.scale"][:, None]).to(dtype)
    placed, x = on_cpu(tensors, dtype), torch.randn(3, 70).to(dtype)
    for rows in (slice(None), slice(3, 20)):
        expected = load_linear({"m.weight": dense, "m.bias": bias}, "m", prepack=False, rows=rows)(x)
        assert torch.equal(load_linear(placed, "m", prepack=False, rows=rows)(x), expected)


def test_rows_of_a_matrix_for_a_rank() -> None:
    tensors = stored(Fp8Weight, torch.randn(96, 130))
    taken = Fp8Weight.take_rows(tensors, "m", [slice(16, 32), slice(64, 112)])
    rows = [*range(16, 32), *range(64, 96)]
    assert torch.equal(taken["fp8"].view(torch.uint8), tensors["m.fp8"].view(torch.uint8)[rows])
    assert torch.equal(taken["scale"], tensors["m.scale"][rows])


def test_4_bits_stay_on_the_cpu() -> None:
    with pytest.raises(AssertionError, match="4 bits run on the CPU alone"):
        on_gpu(stored(Int4Weight, torch.randn(32, 128)))
