"""A linear layer chooses its product by device, dtype and number of rows; all products give the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from dpn_rt.model.linear import Linear
from dpn_rt.model.weights.dense import DenseWeight, can_prepack
from dpn_rt.model.weights.product import SIZES_PER_OCTAVE, few_sizes
from dpn_rt.schema.activation import ProductActivation
from dpn_rt.tuning.cpu_choices import default_choices
from tests.ops.activation_reference import ACTIVATIONS
from tests.skips import NO_ONEDNN

MOST = default_choices().most_streamed_rows


@given(st.integers(1, 1 << 20))
def test_little_is_added(rows: int) -> None:
    assert rows <= few_sizes(rows) <= rows * (1 + 1 / SIZES_PER_OCTAVE)
    assert few_sizes(few_sizes(rows)) == few_sizes(rows)


def test_sizes_are_few() -> None:
    assert len({few_sizes(rows) for rows in range(1024, 2049)}) == SIZES_PER_OCTAVE + 1


@pytest.mark.parametrize(
    ("dtype", "prepack"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("rows", [0, 1, MOST, MOST + 1, 64, 65, 131])
def test_rows_are_what_they_are_alone(rows: int, dtype: torch.dtype, prepack: bool) -> None:
    if prepack and not can_prepack(dtype):
        pytest.skip(NO_ONEDNN)
    x, weight, bias = torch.randn(rows, 48), torch.randn(40, 48), torch.randn(40)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    result = Linear(DenseWeight(weight, prepack=prepack), bias)(x)
    expected = x.double() @ weight.double().t() + bias.double()
    assert result.shape == (rows, 40) and result.is_contiguous() and result.dtype == dtype
    tolerance = {torch.bfloat16: 2**-8, torch.float32: 1e-6}[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance * 20)


@pytest.mark.parametrize(
    ("dtype", "prepack"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("rows", [0, 1, MOST, MOST + 1, 131])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(rows: int, activation: ProductActivation, dtype: torch.dtype, prepack: bool) -> None:
    if prepack and not can_prepack(dtype):
        pytest.skip(NO_ONEDNN)
    x, weight, bias = (values.to(dtype) for values in (torch.randn(rows, 48), torch.randn(40, 48), torch.randn(40)))
    result = Linear(DenseWeight(weight, prepack=prepack), bias, activation)(x)
    sums = x.double() @ weight.double().t() + bias.double()
    expected = ACTIVATIONS[activation](sums)
    assert result.shape == expected.shape and result.is_contiguous() and result.dtype == dtype
    tolerance = {torch.bfloat16: 2**-7, torch.float32: 1e-6}[dtype]
    if activation == "silu_mul":  # of two sums, each rounded; a gate's error grows with its size
        tolerance = {torch.bfloat16: 2**-6, torch.float32: 2e-5}[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance * 20)


class Calls:
    """Records which product is called, with how many rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, int]] = []
        monkeypatch.setattr(ops, "linear", self._counted("kernel", ops.linear))
        monkeypatch.setattr(functional, "linear", self._counted("torch", functional.linear))

    def _counted(self, name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.seen.append((name, len(x)))
            return function(x, *args, **kwargs)

        return call


@pytest.mark.parametrize(
    ("dtype", "few", "many"),
    [
        (torch.float32, [("kernel", MOST)], [("torch", 130)]),
        (torch.bfloat16, [("kernel", MOST)], [("torch", 136)]),
        (torch.float16, [("torch", MOST)], [("torch", 130)]),
    ],
    ids=str,
)
def test_which_product(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, few: list[Any], many: list[Any]) -> None:
    calls = Calls(monkeypatch)
    linear = Linear(DenseWeight(torch.randn(40, 48).to(dtype)))
    linear(torch.randn(MOST, 48).to(dtype))
    assert calls.seen == few
    calls.seen.clear()
    linear(torch.randn(130, 48).to(dtype))
    assert calls.seen == many


@pytest.mark.skipif(not can_prepack(torch.bfloat16), reason=NO_ONEDNN)
def test_a_prepacked_weight_is_for_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    weight, x = torch.randn(40, 48).bfloat16(), torch.randn(130, 48).bfloat16()
    linear = Linear(DenseWeight(weight, prepack=True))
    assert torch.equal(linear(x), Linear(DenseWeight(weight))(x))
    assert calls.seen == [("torch", 136)]
    linear(x[:1])
    assert calls.seen[1:] == [("kernel", 1)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [2, MOST + 1])
def test_without_columns(rows: int, with_bias: bool) -> None:
    bias = torch.randn(30) if with_bias else None
    result = Linear(DenseWeight(torch.randn(30, 0)), bias)(torch.randn(rows, 0))
    assert torch.equal(result, torch.zeros(rows, 30) if bias is None else bias.expand(rows, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [2, MOST + 1])
def test_bad_rows_are_refused(rows: int, dtype: torch.dtype) -> None:
    linear = Linear(DenseWeight(torch.randn(4, 8).to(dtype)))
    x = torch.randn(rows, 8).to(dtype)
    cases = [
        (x[:, :7], r"x has shape|weight has shape"),
        (x[None].expand(rows, rows, 8), "x has shape"),
        (torch.randn(MOST + 8).to(dtype), "x has shape"),
        (x.double(), "x is torch.float64|x has dtype float64"),
        (x.to("meta"), "x is .* on meta|x is on"),
        (x.to_sparse(), "x has layout torch.sparse_coo"),
    ]
    for given_rows, message in cases:
        with pytest.raises(KernelArgumentError, match=f"^linear: ({message})"):
            linear(given_rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_bad_weight_or_bias_is_refused(dtype: torch.dtype) -> None:
    weight, bias = torch.zeros(4, 8).to(dtype), torch.zeros(4).to(dtype)
    cases = [
        (weight[0], None, r"weight has shape \[8\], expected \[out_features, in_features\]"),
        (weight[None], None, r"weight has shape \[1, 4, 8\]"),
        (torch.zeros(4, 16).to(dtype)[:, :8], None, "weight has strides"),
        (weight.t(), None, "weight has strides"),
        (weight.to_sparse(), None, "weight has layout"),
        (weight, bias[:3], r"bias has shape \[3\], expected \[4\]"),
        (weight, bias[:1], r"bias has shape \[1\]"),
        (weight, torch.zeros(2, 4).to(dtype), r"bias has shape \[2, 4\]"),
        (weight, torch.zeros(()).to(dtype), r"bias has shape \[\]"),
        (weight, torch.zeros(8).to(dtype)[::2], "bias has strides"),
        (weight, bias.double(), "bias is torch.float64"),
        (weight, bias.to("meta"), "bias is .* on meta"),
    ]
    for bad_weight, bad_bias, message in cases:
        with pytest.raises(KernelArgumentError, match=f"^linear: {message}"):
            Linear(DenseWeight(bad_weight), bad_bias)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("shape '[3]' is invalid for input of size 2"),
    ],
    ids=["memory", "device", "torch"],
)
def test_an_error_of_torchs_own_is_no_bad_argument(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    def fail(*_: object) -> None:
        raise error

    linear = Linear(DenseWeight(torch.zeros(2, 4).half()))
    monkeypatch.setattr(functional, "linear", fail)
    with pytest.raises(type(error)) as caught:
        linear(torch.zeros(2, 4).half())
    assert caught.value is error
