"""Small block allocators of three stages."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dpn_rt.cache.block_allocator import AllocatorConfig, BlockAllocator, BlockIds

GROUPS = (2, 1, 3)
BLOCK_SIZE = 4


def make_allocator(
    num_blocks: int = 60, num_slots: int = 4, copy: Callable[[BlockIds, BlockIds], None] = lambda *_: None
) -> BlockAllocator:
    return BlockAllocator(AllocatorConfig(num_blocks, BLOCK_SIZE, num_slots, 40, GROUPS, block_bytes=100), copy)


def ints(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def groups_for(num_rows: int) -> int:
    return -(-num_rows // BLOCK_SIZE)
