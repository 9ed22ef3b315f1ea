"""A scheduler with a fake allocator of one stage, sequences without prompts, and steps without a model."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np

from dpn_rt.engine.scheduler import Batch, Scheduler
from dpn_rt.engine.sequence import Sequence
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.settings import EngineOptions, resolve
from tests.engine.models import MODEL

BLOCK_SIZE = 4
SETTINGS = resolve(MODEL, EngineOptions(block_size=BLOCK_SIZE, max_num_batched_tokens=100))


def blocks_of_rows(num_rows: int) -> int:
    return -(-num_rows // BLOCK_SIZE)


class FakeAllocator:
    """A `SequenceCache` of one stage with one layer: slots with lists of blocks. Fails when blocks run out."""

    def __init__(self, num_blocks: int, num_slots: int = 64) -> None:
        self.users = [0] * num_blocks
        self.blocks: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self.slots = list(range(num_slots))[::-1]
        self.fitted: list[tuple[Any, int]] = []

    @property
    def num_blocks(self) -> int:
        return len(self.users)

    @property
    def num_free_blocks(self) -> int:
        return self.users.count(0)

    @property
    def num_free_slots(self) -> int:
        return len(self.slots)

    @property
    def bytes_in_use(self) -> int:
        return self.num_blocks - self.num_free_blocks

    def check_fits(self, lengths: Any, max_tokens: int) -> None:
        self.fitted.append((lengths, max_tokens))

    def blocks_for(self, lengths: Any) -> int:
        return sum(blocks_of_rows(length) for length in lengths)

    def blocks_of(self, slot: int) -> int:
        return len(self.blocks[slot])

    def blocks_to_grow(self, slots: np.ndarray) -> int:
        return sum(self.lengths[slot] % BLOCK_SIZE == 0 for slot in slots.tolist())

    def grow(self, slots: np.ndarray) -> None:
        for slot in slots.tolist():
            self.fill(slot, self.lengths[slot] + 1)

    def fill(self, slot: int, num_rows: int) -> None:
        """Makes room for the rows of a prefill, as the engine does."""
        while len(self.blocks[slot]) < blocks_of_rows(num_rows):
            self._take(slot)
        self.lengths[slot] = num_rows

    def fork(self, slot: int, max_blocks: int) -> int | None:
        num_full = self.lengths[slot] // BLOCK_SIZE
        is_partial = self.lengths[slot] % BLOCK_SIZE != 0
        if is_partial > max_blocks:
            return None
        child = self.open_slot()
        for block in self.blocks[slot][:num_full]:
            self.users[block] += 1
            self.blocks[child].append(block)
        if is_partial:
            self._take(child)
        self.lengths[child] = self.lengths[slot]
        return child

    def open_slot(self) -> int:
        slot = self.slots.pop()
        self.blocks[slot], self.lengths[slot] = [], 0
        return slot

    def close_slot(self, slot: int) -> None:
        for block in self.blocks.pop(slot):
            self.users[block] -= 1
        del self.lengths[slot]
        self.slots.append(slot)

    def _take(self, slot: int) -> None:
        assert 0 in self.users, "more blocks than there are"
        block = self.users.index(0)
        self.users[block] = 1
        self.blocks[slot].append(block)


def make(num_blocks: int = 100, **changes: Any) -> tuple[Scheduler, FakeAllocator]:
    cache = FakeAllocator(num_blocks)
    return Scheduler(dataclasses.replace(SETTINGS, **changes), NoReduction(), cache), cache


def sequence(name: str, num_rows: int = 5, max_tokens: int = 100, priority: int = 0) -> Sequence:
    prompt: Any = SimpleNamespace(num_rows=num_rows, segments=(), image_starts=(), is_dense=False)
    nothing: Any = None
    return Sequence(name, 0, prompt, nothing, nothing, None, max_tokens, [], priority)


def add(scheduler: Scheduler, *sequences: Sequence) -> None:
    for each in sequences:
        scheduler.add(each)


def names(batch: Batch | None) -> str:
    """Kind and sequences of a batch, such as `prefill a b`."""
    return "" if batch is None else " ".join([batch.kind, *(each.request_id for each in batch.sequences)])


def prefill(scheduler: Scheduler, cache: FakeAllocator) -> str:
    """A whole prefill with the first token of each sequence."""
    batch = scheduler.schedule()
    assert batch is not None and batch.kind == "prefill"
    assert batch.slots.tolist() == [each.slot for each in batch.sequences]
    fill(batch, cache)
    scheduler.end_prefill()
    take_tokens(batch)
    return names(batch)


def decode(scheduler: Scheduler) -> str:
    batch = scheduler.schedule()
    assert batch is not None and batch.kind == "decode"
    assert batch.slots.tolist() == [each.slot for each in batch.sequences]
    take_tokens(batch)
    return names(batch)


def fill(batch: Batch, cache: FakeAllocator) -> None:
    for each in batch.sequences:
        assert each.slot is not None
        cache.fill(each.slot, each.num_rows)


def take_tokens(batch: Batch) -> None:
    for each in batch.sequences:
        each.output_token_ids.append(0)
