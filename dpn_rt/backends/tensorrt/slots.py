"""KV caches in slots. A slot is a sequence's part of every layer's cache; the plans' limits set its length.

For the scheduler `SlotCache` takes the place of `BlockAllocator`: a slot counts as one KV block.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpn_rt.backends.tensorrt.tensors import StagePlan, cache_names
from dpn_rt.cache.block_allocator import Slots
from dpn_rt.errors import CapacityError
from dpn_rt.format.plans import PlanLimits
from dpn_rt.model.layout import IntArray


@dataclass(frozen=True)
class SlotMemory:
    """The KV caches of all layers."""

    caches: Mapping[str, Tensor]
    """The plans' name of each cache -> `[max_batch, num_kv_heads, stage_rows, head_dim]`."""

    @classmethod
    def allocate(cls, stages: list[StagePlan], dtype: torch.dtype, device: torch.device) -> SlotMemory:
        """Allocate zeroed caches for all slots.

        Args:
            stages: the plans of one phase, one per stage.
            dtype: of the caches.
            device: of the caches.

        Raises:
            CapacityError: there is not enough memory.
        """
        decoder = stages[0].model.decoder
        shapes = {
            name: (stage.limits.max_batch, decoder.num_kv_heads, stage.max_rows, decoder.head_dim)
            for stage in stages
            for layer in stage.layers
            for name in cache_names(layer)
        }
        try:
            return cls({name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()})
        except RuntimeError as error:  # torch's out-of-memory errors are of this type
            total = sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize
            raise CapacityError(
                f"{device} has no room for {total:,} bytes of KV caches: build the engine with a lower --max-batch or "
                "--max-rows"
            ) from error

    @property
    def num_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches.values())

    def part(self, names: tuple[str, ...], first: int, count: int) -> dict[str, Tensor]:
        """The part of the caches `names` that belongs to the slots `first` to `first + count - 1`."""
        return {name: self.caches[name][first : first + count] for name in names}


class SlotCache:
    """A `SequenceCache`: which slots are free, and how many rows each slot holds in each stage."""

    def __init__(self, limits: PlanLimits, memory: SlotMemory) -> None:
        self.memory = memory
        self._limits = limits
        self._lengths = np.zeros((limits.max_batch, len(limits.stage_rows)), dtype=np.int32)
        self._next_positions = self._lengths.copy()
        self._free_slots = list(range(limits.max_batch))  # a heap; low slots are taken first, so batches stay dense

    @property
    def num_blocks(self) -> int:
        """Number of slots, used and free."""
        return self._limits.max_batch

    @property
    def num_free_blocks(self) -> int:
        return len(self._free_slots)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def bytes_in_use(self) -> int:
        return self.memory.num_bytes // self.num_blocks * (self.num_blocks - len(self._free_slots))

    def check_fits(self, lengths: Sequence[int], max_tokens: int) -> None:
        """Refuse a sequence whose `lengths` rows per stage do not fit into a slot.

        Raises:
            CapacityError: names the limits.
        """
        limits = self._limits.stage_rows
        if any(length > limit for length, limit in zip(lengths, limits, strict=True)):
            raise CapacityError(
                f"the request needs up to {lengths} rows per stage with max_tokens={max_tokens}, the plans were built "
                f"for {limits}: shorten prompt or max_tokens, force a route that pools more, or build the engine with "
                "a larger --max-rows"
            )

    def blocks_for(self, lengths: Sequence[int]) -> int:
        """Always one slot; `check_fits` has checked the lengths."""
        return 1

    def blocks_of(self, slot: int) -> int:
        return 1

    def blocks_to_grow(self, slots: Slots) -> int:
        """0: slots have their full length from the start."""
        return 0

    def fork(self, slot: int, max_blocks: int) -> None:
        """None: slots cannot share rows."""

    def open_slot(self) -> int:
        """The lowest free slot; all its lengths are 0.

        Raises:
            CapacityError: every slot is taken.
        """
        if not self._free_slots:
            raise CapacityError(f"all {self.num_blocks} sequence slots of the KV caches are taken")
        return heapq.heappop(self._free_slots)

    def close_slot(self, slot: int) -> None:
        """Gives a slot back."""
        self._lengths[slot] = self._next_positions[slot] = 0
        heapq.heappush(self._free_slots, slot)

    def lengths(self, slots: Slots) -> IntArray:
        """`[num_seqs, num_stages]` int32 rows that each slot holds in each stage."""
        return self._lengths[slots]

    def next_positions(self, slots: Slots) -> IntArray:
        """`[num_seqs, num_stages]` int32 rotary position of the next row."""
        return self._next_positions[slots]

    def fill_stage(self, stage: int, slots: Slots, lengths: IntArray, next_positions: IntArray | None = None) -> None:
        """Records that a stage of `slots` holds `lengths` `[num_seqs]` rows.

        Args:
            stage: of the rows.
            slots: `[num_seqs]`.
            lengths: `[num_seqs]` int32 rows of each slot.
            next_positions: `[num_seqs]` int32 rotary position of the first row after them; None: `lengths`.

        Raises:
            CapacityError: a slot is shorter than that.
        """
        limit = self._limits.stage_rows[stage]
        if (lengths > limit).any():
            raise CapacityError(f"{int(lengths.max())} rows in stage {stage}, the plans were built for {limit}")
        self._lengths[slots, stage] = lengths
        self._next_positions[slots, stage] = lengths if next_positions is None else next_positions

    def grow(self, slots: Slots) -> None:
        """Records one more row in every stage of each of `slots`."""
        for stage in range(self._lengths.shape[1]):
            grown = (self._lengths[slots, stage] + 1, self._next_positions[slots, stage] + 1)
            self.fill_stage(stage, slots, *grown)
