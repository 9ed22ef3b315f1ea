from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.cuda.conftest import Guards, assert_near
from tests.cuda.emulated import Kernels
from tests.ops.conftest import random_rows

FUNCTIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def with_extremes(x: Tensor) -> Tensor:
    extremes = torch.tensor([float("nan"), float("inf"), -float("inf"), -60000.0, 60000.0, -100.0, -30.0, -0.0])
    x.view(-1)[: min(8, x.numel())] = extremes[: x.numel()].to(x.dtype)
    return x


@pytest.mark.parametrize("size", [1, 8, 100, 2056])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_activation(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, kind: str, size: int
) -> None:
    x = guards.put(with_extremes(random_rows(generator, (3, size), dtype, 3.0)))
    out = guards.poisoned(3, size, dtype=dtype)
    kernels.activation(out, x, kind)
    finite = x.isfinite()
    expected = FUNCTIONS[kind](x.double())
    assert_near(out[finite], expected[finite], 1.0, 1e-9)
    assert torch.equal(out.isnan(), x.isnan())
    assert (out[x == float("inf")] == float("inf")).all()
    assert (out[x == -float("inf")].double().abs() < 1e-20).all()


@pytest.mark.parametrize("size", [1, 8, 100, 2056])
def test_silu_mul(kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, size: int) -> None:
    gate_up = guards.put(random_rows(generator, (3, 2 * size), dtype, 3.0))
    out = guards.poisoned(3, size, dtype=dtype)
    kernels.silu_mul(out, gate_up)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert_near(out, functional.silu(gate) * up, 1.0, 1e-9)


def test_silu_mul_into_its_gate_half(kernels: Kernels, guards: Guards, generator: torch.Generator) -> None:
    gate_up = guards.put(random_rows(generator, (4, 64), torch.float32))
    gate, up = gate_up.double().chunk(2, dim=1)
    kernels.silu_mul(gate_up[:, :32], gate_up)
    assert_near(gate_up[:, :32], functional.silu(gate) * up, 4.0, 1e-7)
    assert torch.equal(gate_up[:, 32:].double(), up)
