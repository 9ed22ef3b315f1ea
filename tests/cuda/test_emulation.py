"""Mistakes that the emulation of the GPU must find, planted in small kernels (`emulation/mistakes.cpp`)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import Guards, int32
from tests.cuda.emulated import KernelError, Kernels

BLOCKS, THREADS = 5, 64


def sum_of_blocks(kernels: Kernels, guards: Guards, order: str) -> Tensor:
    """`[1]` what the last of the blocks adds up."""
    parts = guards.poisoned(BLOCKS, THREADS, dtype=torch.float32)
    total = guards.poisoned(1, dtype=torch.float32)
    kernels.sum_of_blocks(parts, total, guards.put(int32([0])), order)
    expected = torch.arange(BLOCKS)[:, None] + torch.arange(THREADS)
    assert torch.equal(parts, expected.float()), "writes are not there after the launch"
    return total


@pytest.mark.parametrize("order", ["acq_rel", "fences"])
def test_the_last_block_sees_what_was_released(kernels: Kernels, guards: Guards, order: str) -> None:
    for _ in range(5):
        expected = sum(block + thread for block in range(BLOCKS) for thread in range(THREADS))
        assert sum_of_blocks(kernels, guards, order).item() == expected


@pytest.mark.parametrize("order", ["no_release", "no_acquire", "fence_before_the_barrier"])
def test_a_missing_fence_is_found(kernels: Kernels, guards: Guards, order: str) -> None:
    for _ in range(5):
        assert math.isnan(sum_of_blocks(kernels, guards, order).item())


def test_a_missing_barrier_is_found(kernels: Kernels, guards: Guards) -> None:
    """Where the thread that counts runs before others: in half of the blocks."""
    assert any(math.isnan(sum_of_blocks(kernels, guards, "no_barrier").item()) for _ in range(20))


@pytest.mark.parametrize("writes", [False, True], ids=["read", "write"])
@pytest.mark.parametrize(
    ("at_end", "index", "place"),
    [(True, 12, "0 bytes after the end of"), (True, 15, "12 bytes after"), (False, -1, "4 bytes before")],
)
def test_an_access_out_of_range_is_found(
    kernels: Kernels, guards: Guards, at_end: bool, index: int, place: str, writes: bool
) -> None:
    x = guards.put(torch.zeros(3, 4), at_end)
    for _ in range(2):
        with pytest.raises(KernelError, match=rf"touch: invalid \w+ of {place}.* argument 0, float32 \[3, 4\]"):
            kernels.touch(x, index, writes)
    kernels.touch(x, 11, writes)  # later launches run


def test_a_write_short_of_the_page_is_found(kernels: Kernels) -> None:
    for at_end, index in ((True, -1), (False, 12)):
        guards = Guards()
        kernels.touch(guards.put(torch.zeros(12), at_end), index, True)
        with pytest.raises(AssertionError, match="wrote out of range"):
            guards.check()


@pytest.mark.parametrize("num_bytes", [0, 1, 16, 100, 4095, 4096, 4097, 10000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64], ids=str)
def test_tensors_are_against_a_page(guards: Guards, num_bytes: int, dtype: torch.dtype) -> None:
    count = num_bytes // dtype.itemsize
    before, after = (guards.put(torch.arange(count).to(dtype), at_end) for at_end in (False, True))
    assert before.data_ptr() % 4096 == 0 and torch.equal(before, after) and before.dtype == dtype
    unused = -(after.data_ptr() + after.nbytes) % 4096
    assert unused < (16 if dtype.is_floating_point else dtype.itemsize)
