"""The block tables of all slots on a device. What has changed on the host is sent there, and nothing else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpn_rt.cache.block_allocator import BlockAllocator, Slots
from dpn_rt.device.device import Device
from dpn_rt.device.packing import Array


class DeviceTables:
    """A copy of `BlockAllocator.all_tables` on a device.

    Blocks that a slot has given back stay in the copy: no entry after a slot's length is read.
    """

    def __init__(self, cache: BlockAllocator, device: Device) -> None:
        """Has its own place as the allocator's `note_tables`."""
        self._cache, self._device = cache, device
        self._first_groups = np.cumsum([0, *cache.config.layer_groups])
        self._changes: list[npt.NDArray[np.int64]] = []  # indices into the flat tables, since they were last taken
        self._num_changes = 0
        (self.tensor,) = device.upload(cache.all_tables)
        """`[all layer groups, num_slots + 1, max_block_groups]` int32."""
        cache.note_tables = self._note

    @property
    def num_groups(self) -> int:
        """Layer groups of all stages."""
        return int(self._first_groups[-1])

    def take_changes(self, size: int) -> list[Array]:
        """What `apply` needs to bring the copy up to date. More than `size` changes are sent and applied at once.

        Returns:
            `[size]` int64 indices into the flat tables and `[size]` int32 blocks to store there. Places that are left
            over store what the padding slot has anyway.
        """
        changes = np.concatenate([*self._changes, np.empty(0, dtype=np.int64)])
        if self._num_changes > self._cache.all_tables.size:
            self.tensor.copy_(self._device.upload(self._cache.all_tables)[0])
        elif len(changes) > size:
            self.apply(*self._device.upload(changes, self._blocks(changes)))
            changes = changes[:0]
        self._changes, self._num_changes = [], 0
        padding = self._cache.padding_slot * self._cache.all_tables.shape[2]
        indices = np.full(size, padding, dtype=np.int64)
        indices[: len(changes)] = changes
        return [indices, self._blocks(indices)]

    def apply(self, indices: Tensor, blocks: Tensor) -> None:
        """Stores `blocks` `[num_changes]` int32 at `indices` `[num_changes]` int64, on the device."""
        self.tensor.view(-1).index_copy_(0, indices, blocks)

    def of_slots(self, slots: Tensor) -> list[Tensor]:
        """Per stage `[groups, num_seqs, max_block_groups]` int32 of `slots` `[num_seqs]` int64, on the device."""
        tables = self.tensor.index_select(1, slots)
        return list(tables.split_with_sizes(self._cache.config.layer_groups))

    def _blocks(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        return np.take(self._cache.all_tables, indices)

    def _note(self, stage: int, slots: Slots, indices: npt.NDArray[np.integer]) -> None:
        _, num_slots, width = self._cache.all_tables.shape
        groups = np.arange(*self._first_groups[stage : stage + 2])[:, None]
        self._num_changes += groups.size * len(slots)
        if self._num_changes > self._cache.all_tables.size:  # no step has read them: all of it will be sent
            self._changes = []
            return
        self._changes.append(((groups * num_slots + slots) * width + indices).reshape(-1))
