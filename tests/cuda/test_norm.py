from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import Guards, assert_near
from tests.cuda.emulated import KernelError, Kernels
from tests.ops.conftest import random_rows

EPS = 1e-5
# One element; rows of a warp, full and not; of a block with unused threads; unaligned short and long; of many vectors.
SIZES = [1, 8, 64, 250, 1000, 1024, 1032, 4096, 4100, 5001, 20480]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = x.double()
    if bias is not None:
        x = x - x.mean(1, keepdim=True)
    x = x / (x.square().mean(1, keepdim=True) + EPS).sqrt() * weight.double()
    return x if bias is None else x + bias.double()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"])
def test_norm(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, kind: str, size: int
) -> None:
    rows = 5 if size < 2000 else 2
    x = guards.put(random_rows(generator, (rows, size), dtype, 1.5, 3.0))
    weight, bias = (guards.put(random_rows(generator, (size,), dtype)) for _ in range(2))
    residual = guards.put(random_rows(generator, (rows, size), dtype, 2.0))
    out = guards.poisoned(rows, size, dtype=dtype)
    summed = (x.float() + residual.float()).to(dtype) if "add" in kind else x
    expected = reference(summed, weight, bias if "layer" in kind else None)
    extra = [residual] if "add" in kind else []
    getattr(kernels, kind)(out, x, *extra, weight, *([bias] if "layer" in kind else []), EPS)
    assert_near(out, expected)
    if "add" in kind:
        assert torch.equal(residual, summed)


@pytest.mark.parametrize("size", [24, 4096])
def test_float32_in_place_with_strided_rows(
    kernels: Kernels, guards: Guards, generator: torch.Generator, size: int
) -> None:
    wide = guards.put(random_rows(generator, (6, size + 4), torch.float32))
    weight = guards.put(random_rows(generator, (size,), torch.float32))
    out = guards.poisoned(6, size, dtype=torch.float32)
    kernels.rms_norm(out, wide[:, 4:], weight, EPS)
    assert_near(out, reference(wide[:, 4:], weight, None), 4, 1e-6)
    again = out.clone()
    kernels.rms_norm(again, again, weight, EPS)
    assert_near(again, reference(out, weight, None), 4, 1e-6)


def test_a_far_mean_does_not_cancel(kernels: Kernels, guards: Guards, generator: torch.Generator) -> None:
    x = guards.put(random_rows(generator, (3, 2048), torch.float32, 0.1, 3000.0))
    weight, bias = guards.put(torch.ones(2048)), guards.put(torch.zeros(2048))
    out = guards.poisoned(3, 2048, dtype=torch.float32)
    kernels.layer_norm(out, x, weight, bias, EPS)
    assert_near(out, reference(x, weight, bias), 4, 1e-6)


def test_no_rows_and_too_long_rows(kernels: Kernels, guards: Guards, dtype: torch.dtype) -> None:
    weight = guards.put(torch.ones(32, dtype=dtype))
    kernels.rms_norm(guards.poisoned(0, 32, dtype=dtype), guards.poisoned(0, 32, dtype=dtype), weight, EPS)
    long = torch.zeros(1, 16 * 1024 + 1, dtype=dtype)
    with pytest.raises(KernelError, match="rms_norm: hidden_size is 16385, expected 1 to 16384"):
        kernels.rms_norm(long.clone(), long, long[0].clone(), EPS)
