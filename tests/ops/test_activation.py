from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from tests.ops.activation_reference import FUNCTIONS, silu_mul
from tests.ops.conftest import assert_close_to_reference, poisoned, random_rows

SHAPES = [(1, 1), (1, 7), (2, 8), (3, 15), (3, 16), (2, 17), (5, 33), (40, 1000), (0, 8), (3, 0)]


@pytest.mark.cpu_only
def test_gelu_tanh_is_torchs() -> None:
    x = torch.linspace(-4, 9, 1000)[None]
    torch.testing.assert_close(ops.activation(x, "gelu_tanh"), functional.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up = random_rows(generator, (shape[0], 2 * shape[1]), dtype, 4.0)
    out = ops.silu_mul(gate_up, out=poisoned(shape, dtype))
    assert_close_to_reference(out, silu_mul(gate_up.double()), silu_mul(gate_up))
    assert torch.equal(ops.silu_mul(gate_up), out)


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activation(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, int], kind: str) -> None:
    x = random_rows(generator, shape, dtype, 4.0)
    out = ops.activation(x, kind, out=poisoned(shape, dtype))  # type: ignore[arg-type]
    assert_close_to_reference(out, FUNCTIONS[kind](x.double()), FUNCTIONS[kind](x))
    in_place = x.clone()
    ops.activation(in_place, kind, out=in_place)  # type: ignore[arg-type]
    assert torch.equal(in_place, out)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_every_bfloat16_value_is_rounded_from_nearly_the_exact_one(kind: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)[None]
    x = x[x.isfinite() & (x.abs() < 1e30)][None]
    out = ops.activation(x, kind).double()  # type: ignore[arg-type]
    # For large negative inputs torch's gelu loses all digits by cancellation, even in float64.
    exact = x.double() * torch.erfc(-x.double() / 2**0.5) / 2 if kind == "gelu" else FUNCTIONS[kind](x.double())
    assert ((out - exact).abs() <= exact.abs() * 2**-8 + 1e-20).all()


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_infinities_and_nan(dtype: torch.dtype, kind: str) -> None:
    x = torch.tensor([[float("inf"), -float("inf"), float("nan"), 0.0] * 5], dtype=dtype)
    out = ops.activation(x, kind)[0]  # type: ignore[arg-type]
    assert (out[0::4] == float("inf")).all()
    assert (out[1::4].abs() < 1e-30).all()
    assert out[2::4].isnan().all()
    assert (out[3::4] == 0).all()
    gated = ops.silu_mul(torch.cat([x, torch.ones_like(x)], dim=1))[0]
    assert torch.equal(gated.isnan(), out.isnan())
    assert (gated[1::4].abs() < 1e-30).all()


def test_strided_rows_and_the_gate_half_in_place(generator: torch.Generator, dtype: torch.dtype) -> None:
    wide = random_rows(generator, (6, 100), dtype)
    assert torch.equal(ops.silu_mul(wide[:, 3:63]), ops.silu_mul(wide[:, 3:63].contiguous()))
    assert torch.equal(ops.activation(wide[:, 3:63], "gelu"), ops.activation(wide[:, 3:63].contiguous(), "gelu"))
    gate_up = wide[:, :64].contiguous()
    expected, up = ops.silu_mul(gate_up), gate_up[:, 32:].clone()
    ops.silu_mul(gate_up, out=gate_up[:, :32])
    assert torch.equal(gate_up[:, :32], expected)
    assert torch.equal(gate_up[:, 32:], up)


@pytest.mark.cpu_only
def test_bad_arguments_are_refused_by_name() -> None:
    x = torch.zeros(4, 8)
    cases = [
        (lambda: ops.silu_mul(torch.zeros(4, 7)), "gate_up has 7 columns"),
        (lambda: ops.silu_mul(torch.zeros(8)), r"gate_up has shape \[8\]"),
        (lambda: ops.silu_mul(x.double()), "gate_up has dtype"),
        (lambda: ops.silu_mul(x, out=torch.zeros(4, 8)), r"out has shape \[4, 8\], expected .*=4"),
        (lambda: ops.silu_mul(x, out=torch.zeros(4, 4).bfloat16()), "out has dtype bfloat16, expected float32"),
        (lambda: ops.silu_mul(x, out=x[:, 4:]), "out shares memory with gate_up"),
        (lambda: ops.silu_mul(x, out=torch.zeros(1, 4).expand(4, 4)), "rows of out overlap"),
        (lambda: ops.silu_mul(x.to("meta")), "gate_up is on "),
        (lambda: ops.activation(x, "relu"), "kind is 'relu', expected 'quick_gelu', 'gelu' or 'gelu_tanh'"),
        (lambda: ops.activation(x[0], "gelu"), r"x has shape \[8\]"),
        (lambda: ops.activation(x.half(), "gelu"), "x has dtype float16"),
        (lambda: ops.activation(x[:, ::2], "gelu", out=torch.zeros(4, 4)), "x has stride 2"),
        (lambda: ops.activation(x, "gelu", out=torch.zeros(4, 9)), r"out has shape \[4, 9\]"),
        (lambda: ops.activation(x[:3], "gelu", out=x[1:]), "out shares memory with x"),
        (lambda: ops.activation(x, "gelu", out=x.bfloat16()), "out has dtype bfloat16"),
    ]
    for call, message in cases:
        with pytest.raises(KernelArgumentError, match=message):
            call()
