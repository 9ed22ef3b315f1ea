"""Fixtures for kernels on the emulated GPU, and for tensors between guards."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.cuda.emulated import Kernels, build
from tests.cuda.guard_pages import GuardedBytes
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
    """Tensors between pages that cannot be accessed: at random against the page before or the one after.

    An access of that page ends the kernel. On the other side, up to the next page, an element has NaN or -2^30: a read
    there shows in the results, a write in `check`.
    """

    def __init__(self) -> None:
        self._random = random.Random(torch.initial_seed())
        self._memory: list[tuple[GuardedBytes, Tensor]] = []

    def put(self, tensor: Tensor, at_end: bool | None = None) -> Tensor:
        """A contiguous copy.

        Args:
            tensor: to copy.
            at_end: whether it is against the page after it, not the one before it; None: at random.
        """
        at_end = self._random.random() < 0.5 if at_end is None else at_end
        # Floats are loaded 16 bytes at once where their address is a multiple of that, as a GPU's allocations are.
        alignment = 16 if tensor.is_floating_point() else tensor.itemsize
        memory = GuardedBytes(tensor.numel() * tensor.itemsize, at_end, alignment)
        everywhere = memory.all.view(tensor.dtype)
        everywhere.copy_(self._filled(tuple(everywhere.shape), tensor.dtype))
        memory.own.view(tensor.dtype).copy_(tensor.reshape(-1))
        self._memory.append((memory, memory.unused.clone()))
        return memory.own.view(tensor.dtype).view(tensor.shape)

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
        for memory, unused in self._memory:
            assert torch.equal(memory.unused, unused), "a kernel wrote out of range"


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
