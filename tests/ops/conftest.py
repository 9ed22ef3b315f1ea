"""Helpers of every kernel test: fresh random inputs, poisoned outputs, a tolerance that calibrates itself."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers that differ from run to run; the seed is printed when a test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def assert_close_to_reference(
    actual: torch.Tensor,
    reference: torch.Tensor,
    same_precision: torch.Tensor,
    floor: float = 1e-6,
) -> None:
    """The error against the float64 reference is at most twice that of the same computation in torch's own precision.

    Torch happens to be exact where there are few elements, so the rounding of the output itself is allowed besides:
    half a unit in the last place of the largest element for bfloat16, two units for float32, where sums round as well.
    `floor` is an absolute allowance.
    """
    assert actual.shape == reference.shape
    assert torch.equal(actual.isnan(), reference.isnan()), "NaN at other places than the reference"
    assert torch.equal(actual.isinf(), reference.isinf()), "infinity at other places than the reference"
    finite = reference.isfinite()
    if not finite.any():
        return
    error = (actual.double() - reference)[finite].abs()
    floor += reference[finite].abs().max().item() * (2**-22 if actual.dtype == torch.float32 else 2**-9)
    allowed = 2 * (same_precision.double() - reference)[finite].abs().max().item() + floor
    worst = int(error.argmax())
    assert error.max().item() <= allowed, (
        f"error {error.max().item():.3e} > {allowed:.3e} at finite element {worst}: "
        f"got {actual[finite].flatten()[worst].item()}, expected {reference[finite].flatten()[worst].item()}"
    )


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An output tensor full of NaN, so that an element that was not written shows."""
    return torch.full(shape, float("nan"), dtype=dtype)


def random_rows(
    generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, offset: float = 0.0
) -> torch.Tensor:
    return (torch.randn(shape, generator=generator) * scale + offset).to(dtype)


Reference = Callable[..., torch.Tensor]
