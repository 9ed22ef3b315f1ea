from __future__ import annotations

import pytest
import torch
import torch.nn.functional as functional

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from tests.ops.conftest import assert_close_to_reference, poisoned, random_rows

SHAPES = [(1, 1), (1, 15), (3, 16), (2, 17), (5, 64), (1, 1024), (33, 100), (300, 2048), (0, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight = random_rows(generator, shape, dtype, 3.0), random_rows(generator, shape[1:], dtype)
    out = ops.rms_norm(x, weight, 1e-5, out=poisoned(shape, dtype))
    reference = functional.rms_norm(x.double(), shape[1:], weight.double(), 1e-5)
    assert_close_to_reference(out, reference, functional.rms_norm(x, shape[1:], weight, 1e-5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    # A mean far above the spread: the variance must not come from a difference of large numbers.
    x, weight, bias = (
        random_rows(generator, shape, dtype, 0.5, 20.0),
        random_rows(generator, shape[1:], dtype),
        random_rows(generator, shape[1:], dtype),
    )
    out = ops.layer_norm(x, weight, bias, 1e-5, out=poisoned(shape, dtype))
    reference = functional.layer_norm(x.double(), shape[1:], weight.double(), bias.double(), 1e-5)
    assert_close_to_reference(out, reference, functional.layer_norm(x, shape[1:], weight, bias, 1e-5), 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_addition_equals_separate_addition(
    generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x, residual = random_rows(generator, shape, dtype), random_rows(generator, shape, dtype)
    weight, bias = random_rows(generator, shape[1:], dtype), random_rows(generator, shape[1:], dtype)
    total = x + residual
    for fused, plain in (
        (lambda r: ops.add_rms_norm(x, r, weight, 1e-6), ops.rms_norm(total, weight, 1e-6)),
        (lambda r: ops.add_layer_norm(x, r, weight, bias, 1e-6), ops.layer_norm(total, weight, bias, 1e-6)),
    ):
        updated = residual.clone()
        assert torch.equal(fused(updated), plain)
        assert torch.equal(updated, total)


def test_strided_rows_and_output_in_place(generator: torch.Generator, dtype: torch.dtype) -> None:
    wide, weight = random_rows(generator, (7, 96), dtype), random_rows(generator, (32,), dtype)
    x = wide[:, 32:64]
    expected = ops.rms_norm(x.contiguous(), weight, 1e-5)
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), expected)
    in_place = x.contiguous()
    ops.rms_norm(in_place, weight, 1e-5, out=in_place)
    assert torch.equal(in_place, expected)


def test_nan_stays_in_its_row(generator: torch.Generator, dtype: torch.dtype) -> None:
    x, weight = random_rows(generator, (4, 40), dtype), random_rows(generator, (40,), dtype)
    x[2, 3] = float("nan")
    out = ops.rms_norm(x, weight, 1e-5)
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()


@pytest.mark.cpu_only
def test_bad_arguments_are_refused_by_name() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    cases = [
        (lambda: ops.rms_norm(x, weight[:4], 1e-5), r"weight has shape \[4\], expected \[hidden_size=8\]"),
        (lambda: ops.rms_norm(x.double(), weight, 1e-5), "x has dtype .*, expected float32 or bfloat16"),
        (lambda: ops.rms_norm(x, weight.bfloat16(), 1e-5), "weight has dtype bfloat16, expected float32"),
        (lambda: ops.rms_norm(x[0], weight, 1e-5), r"x has shape \[8\], expected \[num_tokens, hidden_size\]"),
        (lambda: ops.rms_norm(x, weight, -1.0), "eps is -1"),
        (lambda: ops.rms_norm(torch.zeros(2, 16)[:, ::2], weight, 1e-5), "x has stride 2 in its last dimension"),
        (lambda: ops.rms_norm(x, weight, 1e-5, out=torch.zeros(3, 8)), r"out has shape \[3, 8\]"),
        (lambda: ops.add_rms_norm(x, x, weight, 1e-5), "residual shares memory with x"),
        (lambda: ops.add_rms_norm(x, torch.zeros(1, 8), weight, 1e-5), r"residual has shape \[1, 8\]"),
        (lambda: ops.layer_norm(x, weight, torch.zeros(9), 1e-5), r"bias has shape \[9\]"),
        (lambda: ops.rms_norm(x.to("meta"), weight, 1e-5), "x is on "),
    ]
    for call, message in cases:
        with pytest.raises(KernelArgumentError, match=message):
            call()
    with pytest.raises(KernelArgumentError, match="x is of type float, expected a tensor"):
        ops.rms_norm([1.0], weight, 1e-5, out=x)  # type: ignore[arg-type]
