"""Block tables on a device: few changes go with what is sent anyway, many are sent on their own."""

from __future__ import annotations

import numpy as np
import torch

from dpn_rt.cache.block_allocator import AllocatorConfig, BlockAllocator
from dpn_rt.cache.device_tables import DeviceTables
from tests.places import CountingDevice


def test_changes_are_taken_once() -> None:
    cache = BlockAllocator(AllocatorConfig(60, 4, 3, 40, (2, 1), block_bytes=1), lambda *_: None)
    device = CountingDevice()
    tables = DeviceTables(cache, device)
    assert device.uploads == 1 and tables.num_groups == 3
    slots = np.array([cache.open_slot(), cache.open_slot()])
    cache.fill_stage(0, slots, np.array([9, 1], dtype=np.int32))  # 3 and 1 blocks in each of two layer groups
    indices, blocks = tables.take_changes(10)
    assert device.uploads == 1 and len(set(indices[:8].tolist())) == 8 and (blocks[8:] == cache.padding_block).all()
    tables.apply(torch.from_numpy(indices), torch.from_numpy(blocks))
    assert torch.equal(tables.tensor, torch.from_numpy(cache.all_tables))
    assert (tables.take_changes(2)[1] == cache.padding_block).all(), "nothing has changed since"


def test_more_changes_than_there_is_room_for() -> None:
    cache = BlockAllocator(AllocatorConfig(60, 4, 3, 40, (2, 1), block_bytes=1), lambda *_: None)
    device = CountingDevice()
    tables = DeviceTables(cache, device)
    cache.fill_stage(0, np.array([cache.open_slot()]), np.array([9], dtype=np.int32))
    _, blocks = tables.take_changes(5)
    assert device.uploads == 2 and (blocks == cache.padding_block).all()
    assert torch.equal(tables.tensor, torch.from_numpy(cache.all_tables))


def test_changes_that_nobody_takes_do_not_pile_up() -> None:
    cache = BlockAllocator(AllocatorConfig(60, 4, 3, 40, (2, 1), block_bytes=1), lambda *_: None)
    device = CountingDevice()
    tables = DeviceTables(cache, device)
    lengths = np.array([40], dtype=np.int32)
    for _ in range(50):
        slot = cache.open_slot()
        cache.fill_stage(0, np.array([slot]), lengths)
        assert sum(map(len, tables._changes)) <= cache.all_tables.size
        cache.close_slot(slot)
    cache.fill_stage(1, np.array([cache.open_slot()]), lengths)
    _, blocks = tables.take_changes(5)
    assert device.uploads == 2 and (blocks == cache.padding_block).all()
    assert torch.equal(tables.tensor, torch.from_numpy(cache.all_tables))
