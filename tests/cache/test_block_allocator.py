"""Blocks of sequences: how many are needed, which are free, and what stays when there are too few."""

from __future__ import annotations

import numpy as np
import pytest

from dpn_rt.cache.block_allocator import BlockIds, count_blocks
from dpn_rt.errors import CapacityError
from tests.cache.allocators import GROUPS, ints, make_allocator


def test_blocks_of_lengths() -> None:
    assert count_blocks([9, 4, 1], GROUPS, 4) == 3 * 2 + 1 * 1 + 1 * 3
    assert count_blocks([0, 0, 0], GROUPS, 4) == 0
    allocator = make_allocator()
    slot = allocator.open_slot()
    for stage, length in enumerate((9, 4, 1)):
        allocator.fill_stage(stage, np.array([slot]), ints(length))
    assert allocator.blocks_of(slot) == allocator.blocks_for([9, 4, 1]) == 10
    assert allocator.bytes_in_use == 1000


def test_what_fits_into_the_empty_pool() -> None:
    allocator = make_allocator(num_blocks=10)
    allocator.open_slot()
    allocator.check_fits((9, 4, 1), 3)
    with pytest.raises(CapacityError, match=r"11 KV blocks .*max_tokens=3.* has 10: raise kv_cache_bytes to .* 1100,"):
        allocator.check_fits((9, 5, 1), 3)
    with pytest.raises(CapacityError, match="shorten prompt or max_tokens"):
        make_allocator(num_blocks=1000).check_fits((41, 1, 1), 3)


def test_unused_blocks_are_enough_or_not() -> None:
    allocator = make_allocator(num_blocks=6, num_slots=2)
    slots = np.array([allocator.open_slot(), allocator.open_slot()])
    for lengths, enough in (((4, 8), True), ((9, 0), True), ((9, 1), False)):  # block groups of 2 blocks
        assert allocator.has_unused_for(0, slots, ints(*lengths)) == enough
    allocator.fill_stage(0, slots, ints(4, 4))
    assert allocator.has_unused_for(0, slots, ints(8, 4))
    assert not allocator.has_unused_for(0, slots, ints(5, 5))


def test_more_than_there_is_changes_nothing() -> None:
    allocator = make_allocator(num_blocks=5, num_slots=1)
    slot = allocator.open_slot()
    with pytest.raises(CapacityError, match="all 1 sequence slots"):
        allocator.open_slot()
    with pytest.raises(CapacityError, match="5 free blocks, 6 are needed"):
        allocator.fill_stage(2, np.array([slot]), ints(5))
    assert allocator.num_free_blocks == 5
    allocator.fill_stage(2, np.array([slot]), ints(4))
    with pytest.raises(CapacityError):
        allocator.grow(np.array([slot]))
    assert allocator.num_free_blocks == 2
    assert allocator.kv_lengths(np.array([slot])).tolist() == [[0, 0, 4]]


def test_as_many_held_blocks_are_asked_for_as_are_missing() -> None:
    allocator = make_allocator(num_blocks=6)
    slot, other = allocator.open_slot(), allocator.open_slot()
    allocator.fill_stage(1, np.array([slot]), ints(8))
    first, second = (allocator.block_groups(slot, index, index + 1)[1] for index in (0, 1))
    both = np.concatenate((first, second), axis=1)
    allocator.hold([both])
    assert not allocator.would_free([both])
    allocator.share(1, other, first, 4)
    allocator.close_slot(slot)
    assert allocator.would_free([both]) and not allocator.would_free([first]), "the second block has no other user"
    assert (allocator.num_unused_blocks, allocator.num_free_blocks) == (4, 5)
    missing: list[int] = []

    def release(num_blocks: int) -> None:
        missing.append(num_blocks)
        allocator.release([both])

    allocator.reclaim = release
    allocator.fill_stage(1, np.array([other]), ints(24))
    assert missing == [1] and allocator.num_unused_blocks == 0


def test_blocks_that_cannot_be_shared_for_want_of_a_copy() -> None:
    allocator = make_allocator(num_blocks=5, num_slots=2)
    slot, other = allocator.open_slot(), allocator.open_slot()
    allocator.fill_stage(0, np.array([slot]), ints(7))
    blocks = allocator.block_groups(slot, 0, 2)[0]
    with pytest.raises(CapacityError, match="1 free blocks, 2 are needed"):
        allocator.share(0, other, blocks, 7)
    assert allocator.kv_lengths(np.array([other])).tolist() == [[0, 0, 0]]
    allocator.close_slot(slot)
    assert allocator.num_unused_blocks == 5


def test_a_copy_that_fails_loses_no_blocks() -> None:
    def fail(*_: BlockIds) -> None:
        raise RuntimeError("no copy")

    allocator = make_allocator(num_slots=2, copy=fail)
    slot = allocator.open_slot()
    allocator.fill_stage(0, np.array([slot]), ints(5))
    with pytest.raises(RuntimeError, match="no copy"):
        allocator.fork(slot, 2)
    assert allocator.num_free_slots == 1 and allocator.num_blocks - allocator.num_free_blocks == 4
    allocator.close_slot(slot)
    assert allocator.num_free_blocks == allocator.num_blocks


def test_blocks_freed_last_are_used_first() -> None:
    """Blocks that were freed last are taken first: they are still in the processor's caches."""
    allocator = make_allocator()
    slots = np.array([allocator.open_slot(), allocator.open_slot()])
    allocator.fill_stage(1, slots, ints(8, 8))
    freed = allocator.block_tables(1, slots[:1]).flatten().tolist()
    allocator.close_slot(int(slots[0]))
    other = allocator.open_slot()
    allocator.fill_stage(1, np.array([other]), ints(8))
    assert set(allocator.block_tables(1, np.array([other])).flatten().tolist()) == set(freed)
    trimmed = allocator.block_tables(1, slots[1:]).flatten().tolist()
    allocator.trim_stage(1, slots[1:], ints(0))
    allocator.fill_stage(1, slots[1:], ints(8))
    assert allocator.block_tables(1, slots[1:]).flatten().tolist() == trimmed


def test_tables_that_the_host_has_no_room_for() -> None:
    with pytest.raises(CapacityError, match="block tables for 1099511627776 sequences: lower max_num_seqs"):
        make_allocator(num_slots=2**40)
