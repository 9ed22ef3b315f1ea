"""Weights in 8 and 4 bits: what is stored, how far it is from the weight, and parts of a fused matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpn_rt.model.linear import linear_specs, load_linear
from dpn_rt.model.weights.forms import load_weight, quantized_form, stored_specs
from dpn_rt.model.weights.fp8 import Fp8Weight
from dpn_rt.model.weights.int4 import Int4Weight
from dpn_rt.model.weights.int8 import Int8Weight
from dpn_rt.model.weights.table import EmbeddingTable
from dpn_rt.model.weights.tiles import pack_int4, pack_int8, unpack_int4, unpack_int8
from dpn_rt.model.weights.weight import QuantizedWeight, Weight
from dpn_rt.schema.activation import ProductActivation
from dpn_rt.schema.weights import WeightSpec
from tests.ops.activation_reference import ACTIVATIONS

SIZES = st.tuples(st.integers(1, 70), st.integers(1, 300))
FORMS: list[type[QuantizedWeight]] = [Int8Weight, Int4Weight]


def drawn(shape: tuple[int, int], least: int, largest: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(least, largest + 1, shape, generator=generator, dtype=torch.int8)


@given(SIZES, st.integers(0, 2**32))
def test_tiles_hold_the_matrix(shape: tuple[int, int], seed: int) -> None:
    rows, columns = shape
    for pack, unpack, least, largest in ((pack_int8, unpack_int8, -127, 127), (pack_int4, unpack_int4, -8, 7)):
        q = drawn(shape, least, largest, seed)
        tiles = pack(q)
        assert tiles.is_contiguous() and tiles.dtype == torch.uint8
        whole = unpack(tiles)
        assert torch.equal(whole[:rows, :columns], q)
        assert not whole[rows:].any() and not whole[:, columns:].any()


def test_places_in_tiles() -> None:
    """Byte by byte, as kernels read them."""
    q = drawn((33, 21), -8, 7, 0)
    eight, four = pack_int8(q), pack_int4(q)
    assert eight.shape == (3, 6, 16, 4) and four.shape == (3, 3, 16, 4)
    for row, column in ((0, 0), (17, 9), (32, 20), (31, 12)):
        value = int(q[row, column])
        assert eight[row // 16, column // 4, row % 16, column % 4] == value + 128
        byte = int(four[row // 16, column // 8, row % 16, column % 4])
        assert (byte >> 4 if column % 8 >= 4 else byte & 15) == value + 8


def stored_values(form: type[QuantizedWeight], stored: dict[str, Tensor]) -> Tensor:
    """What the stored tensors stand for, with the rows and columns that fill tiles and groups."""
    if form is Fp8Weight:
        return stored["fp8"].float() * stored["scale"][:, None]
    if form is Int8Weight:
        q = unpack_int8(stored["int8"])
        return q[: len(stored["scale"])] * stored["scale"][:, None]
    q = unpack_int4(stored["int4"]).float()
    scale = stored["scale"].float().transpose(1, 2).flatten(0, 1)
    return q * scale.repeat_interleave(128, dim=1)[:, : q.shape[1]]


def assert_as_specified(form: type[QuantizedWeight], stored: dict[str, Tensor], rows: int, columns: int) -> None:
    specs = form.specs(rows, columns, torch.float32)
    assert {name: WeightSpec(tuple(each.shape), each.dtype) for name, each in stored.items()} == specs


@pytest.mark.parametrize("columns", [1, 7, 128, 129, 300])
def test_int8_is_half_a_step_off_at_most(columns: int) -> None:
    weight = torch.randn(21, columns)
    weight[3], weight[4] = 0, 1e-30
    stored = Int8Weight.quantize(weight)
    assert_as_specified(Int8Weight, stored, 21, columns)
    error = (stored_values(Int8Weight, stored)[:, :columns] - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)).all()


@pytest.mark.parametrize("columns", [1, 7, 128, 129, 300])
def test_int4_is_no_worse_than_the_plain_scale(columns: int) -> None:
    weight = torch.randn(48, columns) * torch.rand(48, 1).exp()
    weight[3] = 0
    stored = Int4Weight.quantize(weight)
    assert_as_specified(Int4Weight, stored, 48, columns)
    error = (stored_values(Int4Weight, stored)[:, :columns] - weight).double().square()
    for group in range(0, columns, 128):
        part = weight[:, group : group + 128]
        scale = (part.abs().amax(1, keepdim=True) / 7).bfloat16().float()
        plain = torch.round(part / scale.clamp(min=1e-30)).clamp(-8, 7) * scale
        least = (plain - part).double().square().sum(1)
        assert (error[:, group : group + 128].sum(1) <= least * (1 + 1e-6)).all()
    assert error.sum() < 0.011 * weight.double().square().sum(), "about 7.5 % of the values for normal ones, or less"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [slice(None), slice(0, 32), slice(16, 48), slice(48, 64), slice(5, 30), slice(8, 24)])
def test_parts_of_a_fused_matrix(form: type[QuantizedWeight], rows: slice) -> None:
    stored = form.quantize(torch.randn(64, 200))
    tensors = {f"layers.0.qkv.{suffix}": each for suffix, each in stored.items()}
    tensors["layers.0.qkv.bias"] = torch.randn(64)
    x = torch.randn(3, 200)
    whole = load_linear(tensors, "layers.0.qkv", prepack=False)(x)
    assert torch.equal(load_linear(tensors, "layers.0.qkv", prepack=False, rows=rows)(x), whole[:, rows])


@pytest.mark.parametrize("form", FORMS)
def test_its_tensors_are_not_copied(form: type[QuantizedWeight]) -> None:
    tensors = {f"fc1.{suffix}": each for suffix, each in form.quantize(torch.randn(32, 128)).items()}
    linear, x = load_linear(tensors, "fc1", prepack=True), torch.randn(2, 128)
    assert linear(x).any()
    tensors["fc1.scale"].zero_()
    assert not linear(x).any()
    weight: Weight = load_weight(tensors, "fc1", prepack=False)
    assert weight.num_bytes == sum(each.nbytes for each in tensors.values())


@pytest.mark.parametrize("columns", [4, 128, 300])
@pytest.mark.parametrize("form", FORMS)
def test_given_scales_are_taken(form: type[QuantizedWeight], columns: int) -> None:
    """Integers are found again in float32 and bfloat16, the least one too, and products are right with it."""
    groups = 1 if form.group is None else -(-columns // form.group)
    q = torch.randint(form.least, form.largest + 1, (48, columns), dtype=torch.int8)
    q[:, 0], q[3] = form.least, 0
    scale = (torch.rand(48, groups) + 0.5).bfloat16().float()
    scale[3] = 0
    weight = q * scale.repeat_interleave(form.group or columns, dim=1)[:, :columns]
    for dtype in (torch.float32, torch.bfloat16):
        stored = form.quantize(weight.to(dtype), scale[:, 0] if form.group is None else scale)
        assert_as_specified(form, stored, 48, columns)
        assert torch.equal(stored_values(form, stored)[:, :columns], weight)
    tensors = {f"o.{suffix}": each for suffix, each in stored.items()}
    x = torch.randint(-127, 128, (5, columns)).float()
    x[:, 0] = 127
    expected = x.double() @ weight.double().T
    x[:, 0] = 127.5  # the largest value: rounded to 127, and the others to themselves
    actual = load_linear(tensors, "o", prepack=False)(x)
    assert (actual - expected).abs().max() <= 1e-5 * (x.double().abs() @ weight.double().abs().T).max()


@pytest.mark.parametrize("columns", [1, 4, 63, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_table(columns: int, dtype: torch.dtype) -> None:
    """In 8 bits, and as the tensor that they are."""
    weight = torch.randn(37, columns).to(dtype)
    weight[5] = 0
    ids = torch.tensor([36, 0, 5, 15, 16, 16, 31, 32])
    stored = Int8Weight.quantize(weight)
    expected = stored_values(Int8Weight, stored)[:, :columns].to(dtype)
    tensors = {f"embed.{suffix}": each for suffix, each in stored.items()}
    for index in (ids, ids.int(), ids[:1], ids[:0]):
        rows = EmbeddingTable(tensors, "embed", columns, dtype).rows(index)
        assert rows.dtype == dtype and rows.is_contiguous() and torch.equal(rows, expected[index])
        assert torch.equal(EmbeddingTable({"embed.weight": weight}, "embed", columns, dtype).rows(index), weight[index])


def test_which_form_a_weight_takes() -> None:
    specs = dict(linear_specs("o", 64, 48, torch.bfloat16, bias=True, least_bits=4))
    assert quantized_form(specs["o.weight"], "none") is None
    assert quantized_form(specs["o.weight"], "int8") is Int8Weight
    assert quantized_form(specs["o.weight"], "int4") is Int4Weight
    assert quantized_form(specs["o.bias"], "int4") is None
    odd = dict(linear_specs("o", 63, 48, torch.bfloat16, bias=False, least_bits=4))
    assert quantized_form(odd["o.weight"], "int4") is Int8Weight, "tiles of 4 bits hold whole rows of 16"
    head = dict(linear_specs("head", 64, 48, torch.bfloat16, bias=False, least_bits=8))
    assert quantized_form(head["head.weight"], "int4") is Int8Weight
    table = WeightSpec((64, 48), torch.bfloat16, least_bits=8, kept_by_int8=True)
    assert quantized_form(table, "int8") is None and quantized_form(table, "int4") is Int8Weight
    assert quantized_form(table, "fp8") is None and quantized_form(odd["o.weight"], "fp8") is Fp8Weight
    assert quantized_form(head["head.weight"], "fp8") is Fp8Weight
    patches = dict(linear_specs("patches", 64, 48, torch.bfloat16, bias=False))
    assert stored_specs("patches.weight", patches["patches.weight"], "int8") == patches
    assert stored_specs("o.weight", specs["o.weight"], "int8") == {
        "o.int8": WeightSpec((4, 12, 16, 4), torch.uint8),
        "o.scale": WeightSpec((64,), torch.float32),
    }
    assert stored_specs("o.weight", odd["o.weight"], "fp8") == {
        "o.fp8": WeightSpec((63, 48), torch.float8_e4m3fn),
        "o.scale": WeightSpec((63,), torch.float32),
    }


@pytest.mark.parametrize("kind", ["gelu", "silu_mul"])
@pytest.mark.parametrize("rows", [slice(None), slice(3, 25), slice(16, 64), slice(0, 32)])
@pytest.mark.parametrize("form", FORMS)
def test_activation_of_the_product(form: type[QuantizedWeight], rows: slice, kind: ProductActivation) -> None:
    stored = {f"fc1.{name}": tensor for name, tensor in form.quantize(torch.randn(64, 300)).items()}
    stored["fc1.bias"] = torch.randn(64)
    x = torch.randn(5, 300)
    plain = load_linear(stored, "fc1", prepack=False, rows=rows)
    activated = load_linear(stored, "fc1", prepack=False, rows=rows, activation=kind)
    tolerance = 1e-5 if kind == "silu_mul" else 1e-6  # a gate multiplies two sums
    torch.testing.assert_close(activated(x), ACTIVATIONS[kind](plain(x)), rtol=tolerance, atol=tolerance)
