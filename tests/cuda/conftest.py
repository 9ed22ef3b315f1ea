"""Fixtures for kernels on the emulated GPU, and for tensors between guards."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.cuda.emulated import Kernels, build
from tests.ops.conftest import generator
from tests.skips import NO_COMPILER

__all__ = ["generator"]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """Built when the first test asks for it."""
    if shutil.which("g++") is None or shutil.which("make") is None:
        pytest.skip(NO_COMPILER)
    return build()


@pytest.fixture(params=HALVES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


class Guards:
    """Tensors with NaN before and after them. A read out of range shows in the results, a write in `check`."""

    SIZE = 64

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def put(self, tensor: Tensor) -> Tensor:
        """A contiguous copy, with torch's alignment."""
        buffer = self._filled((tensor.numel() + 2 * self.SIZE,), tensor.dtype)
        inner = buffer[self.SIZE : self.SIZE + tensor.numel()].view(tensor.shape)
        inner.copy_(tensor)
        self._buffers.append((buffer, buffer.clone()))
        return inner

    def poisoned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An output filled as `_filled` does; a kernel must write every element."""
        return self.put(self._filled(shape, dtype))

    @staticmethod
    def _filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """NaN, or -2^30 for integers; the byte 0x7E for what has 8 bits."""
        if dtype.itemsize == 1:
            return torch.full(shape, 0x7E, dtype=torch.uint8).view(dtype)
        return torch.full(shape, float("nan") if dtype.is_floating_point else -(2**30), dtype=dtype)

    def check(self) -> None:
        for buffer, before in self._buffers:
            for part in (slice(None, self.SIZE), slice(-self.SIZE, None)):
                now, then = buffer[part].view(torch.uint8), before[part].view(torch.uint8)
                assert torch.equal(now, then), "a kernel wrote out of range"


@pytest.fixture
def guards() -> Iterator[Guards]:
    guards = Guards()
    yield guards
    guards.check()


def assert_near(actual: Tensor, reference: Tensor, units: float = 1.0, floor: float = 1e-5) -> None:
    """Every element within `units` of the output's own rounding (plus `floor` times the largest) of the float64 result.

    A correctly rounded result is within half a unit in the last place.
    """
    assert actual.shape == reference.shape
    assert torch.equal(actual.isnan(), reference.isnan()), "NaN at other places than the reference"
    finite = reference.isfinite()
    if not finite.any():
        return
    expected = reference[finite]
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}[actual.dtype]
    smallest = 2.0**-24 if actual.dtype == torch.float16 else 0.0  # steps of subnormal numbers
    allowed = units * (expected.abs() * rounding + smallest) + floor * expected.abs().max() + 1e-30
    excess = (actual.double()[finite] - expected).abs() / allowed
    worst = int(excess.argmax())
    assert excess[worst] <= 1, (
        f"finite element {worst}: got {actual[finite][worst].item()}, expected {expected[worst].item()}, "
        f"{excess[worst].item():.2f} of the allowed error; shape {list(actual.shape)}"
    )


def offsets(lengths: list[int]) -> Tensor:
    """`[num_seqs + 1]` int32."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


def int32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rounds_up(value: int, step: int) -> int:
    return math.ceil(value / step) * step
