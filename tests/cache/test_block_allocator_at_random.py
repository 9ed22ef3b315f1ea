"""Blocks, slots, lengths and positions against a simple model, for any order of calls."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dpn_rt.cache.block_allocator import BlockIds
from dpn_rt.cache.device_tables import DeviceTables
from dpn_rt.errors import CapacityError
from tests.cache.allocators import BLOCK_SIZE, GROUPS, groups_for, ints, make_allocator
from tests.places import CountingDevice

STAGES = range(len(GROUPS))


@dataclass
class Rows:
    """The rows that one stage of a sequence should hold."""

    ids: list[int] = field(default_factory=list)
    """One id per row; every row that is written has its own."""
    next_position: int = 0
    num_fixed: int = 0
    """Number of first rows that other sequences may read; these are never trimmed."""


@dataclass(frozen=True, eq=False)
class Held:
    """Blocks of one stage that are held, as the prefix cache holds some, and the ids of their rows."""

    stage: int
    blocks: BlockIds
    """`[layer_groups, num_block_groups]`."""
    ids: tuple[int, ...]


class AllocatorMachine(RuleBasedStateMachine):
    """Random calls. `contents` `[num_blocks + 1, BLOCK_SIZE]` takes the place of the pool: it holds 8 * id + group."""

    @initialize(num_blocks=st.integers(6, 50), num_slots=st.integers(1, 5))
    def begin(self, num_blocks: int, num_slots: int) -> None:
        self.allocator = make_allocator(num_blocks, num_slots, self.copy)
        self.allocator.reclaim = self.reclaim
        self.on_device = DeviceTables(self.allocator, CountingDevice())
        self.contents = np.full((num_blocks + 1, BLOCK_SIZE), -1)
        self.rows: dict[int, list[Rows]] = {}
        self.held: list[Held] = []
        self.row_ids = itertools.count()

    def copy(self, sources: BlockIds, targets: BlockIds) -> None:
        assert not set(sources.tolist()) & set(targets.tolist()) and len(set(targets.tolist())) == len(targets)
        self.contents[targets] = self.contents[sources]

    def reclaim(self, num_blocks: int) -> None:
        goal = self.allocator.num_unused_blocks + num_blocks
        for entry in list(self.held):
            if self.allocator.num_unused_blocks >= goal:
                return
            if self.allocator.would_free([entry.blocks]):
                self.held.remove(entry)
                self.allocator.release([entry.blocks])

    def write(self, stage: int, slot: int, count: int) -> None:
        """Writes the rows of a step, for which there is room."""
        rows = self.rows[slot][stage]
        table = self.allocator.block_tables(stage, np.array([slot]))[:, 0]
        for index in range(len(rows.ids), len(rows.ids) + count):
            rows.ids.append(next(self.row_ids))
            for group, block in enumerate(table[:, index // BLOCK_SIZE]):
                assert len(self.users()[int(block)]) == 1, "a block that another sequence reads is written"
                self.contents[block, index % BLOCK_SIZE] = 8 * rows.ids[-1] + group

    def users(self) -> dict[int, list[int]]:
        """Slots that use each block."""
        users: dict[int, list[int]] = {block: [] for block in range(self.allocator.num_blocks)}
        for slot, stages in self.rows.items():
            for stage, rows in enumerate(stages):
                count = groups_for(self.allocator.kv_lengths(np.array([slot]))[0, stage])
                table = self.allocator.block_tables(stage, np.array([slot]), whole=True)[:, 0]
                assert (table[:, count:] == -1).all() and groups_for(len(rows.ids)) <= count
                for block in table[:, :count].flatten().tolist():
                    users[block].append(slot)
        return users

    def holds(self) -> Counter[int]:
        """How many entries of `held` have each block."""
        return Counter(block for entry in self.held for block in entry.blocks.flatten().tolist())

    def free_without(self, blocks: BlockIds) -> int:
        """Number of blocks that a sequence could get while `blocks` stay held."""
        users, held = self.users(), self.holds().keys()
        taken = {block for block, slots in users.items() if slots} | (held & set(blocks.flatten().tolist()))
        return self.allocator.num_blocks - len(taken)

    def slot(self, number: int) -> int:
        return list(self.rows)[number % len(self.rows)]

    @rule()
    def open(self) -> None:
        if not self.allocator.num_free_slots:
            with pytest.raises(CapacityError, match="sequence slots of the KV cache are taken"):
                self.allocator.open_slot()
            return
        slot = self.allocator.open_slot()
        assert slot not in self.rows
        self.rows[slot] = [Rows() for _ in STAGES]

    @precondition(lambda self: self.rows)
    @rule(number=st.integers(0, 9))
    def close(self, number: int) -> None:
        slot = self.slot(number)
        self.allocator.close_slot(slot)
        del self.rows[slot]

    @precondition(lambda self: self.rows)
    @rule(
        stage=st.sampled_from(STAGES),
        counts=st.lists(st.integers(0, 13), min_size=1, max_size=5),
        offset=st.none() | st.integers(0, 50),
    )
    def fill(self, stage: int, counts: list[int], offset: int | None) -> None:
        slots = list(self.rows)[: len(counts)]
        lengths = [len(self.rows[slot][stage].ids) for slot in slots]
        wanted = [min(40, length + count) for length, count in zip(lengths, counts, strict=False)]
        missing = sum(groups_for(w) - groups_for(n) for w, n in zip(wanted, lengths, strict=True)) * GROUPS[stage]
        unused = self.allocator.num_unused_blocks
        assert self.allocator.has_unused_for(stage, np.array(slots), ints(*wanted)) == (missing <= unused)
        positions = None if offset is None else ints(*wanted) + offset
        if missing > self.allocator.num_free_blocks:
            with pytest.raises(CapacityError, match=f"free blocks, {missing} are needed"):
                self.allocator.fill_stage(stage, np.array(slots), ints(*wanted), positions)
            return
        self.allocator.fill_stage(stage, np.array(slots), ints(*wanted), positions)
        for slot, old, new in zip(slots, lengths, wanted, strict=True):
            self.write(stage, slot, new - old)
            self.rows[slot][stage].next_position = new + (offset or 0)

    @precondition(lambda self: self.rows)
    @rule(count=st.integers(1, 5))
    def grow(self, count: int) -> None:
        slots = list(self.rows)[:count]
        if any(len(rows.ids) == 40 for slot in slots for rows in self.rows[slot]):
            return
        missing = sum(
            (len(self.rows[slot][stage].ids) % BLOCK_SIZE == 0) * GROUPS[stage] for slot in slots for stage in STAGES
        )
        assert self.allocator.blocks_to_grow(np.array(slots)) == missing
        if missing > self.allocator.num_free_blocks:
            with pytest.raises(CapacityError):
                self.allocator.grow(np.array(slots))
            return
        self.allocator.grow(np.array(slots))
        for slot, stage in itertools.product(slots, STAGES):
            self.write(stage, slot, 1)
            self.rows[slot][stage].next_position += 1

    @precondition(lambda self: self.rows)
    @rule(
        stage=st.sampled_from(STAGES),
        counts=st.lists(st.integers(-3, 9), min_size=1, max_size=5),
        position=st.none() | st.integers(0, 50),
    )
    def trim(self, stage: int, counts: list[int], position: int | None) -> None:
        slots = list(self.rows)[: len(counts)]
        rows = [self.rows[slot][stage] for slot in slots]
        wanted = [max(each.num_fixed, len(each.ids) - count) for each, count in zip(rows, counts, strict=False)]
        positions = None if position is None else ints(*[position] * len(slots))
        self.allocator.trim_stage(stage, np.array(slots), ints(*wanted), positions)
        for each, length in zip(rows, wanted, strict=True):
            del each.ids[length:]
            each.next_position = len(each.ids) if position is None else position

    @precondition(lambda self: self.rows)
    @rule(number=st.integers(0, 9), fewer=st.integers(-1, 2))
    def fork(self, number: int, fewer: int) -> None:
        slot = self.slot(number)
        parent = self.rows[slot]
        copies = sum((len(rows.ids) % BLOCK_SIZE != 0) * groups for rows, groups in zip(parent, GROUPS, strict=True))
        if fewer == 1:
            assert copies == 0 or self.allocator.fork(slot, copies - 1) is None
        elif copies > self.allocator.num_free_blocks or not self.allocator.num_free_slots:
            with pytest.raises(CapacityError):
                self.allocator.fork(slot, copies)
        else:
            child = self.allocator.fork(slot, copies)
            assert child is not None and child not in self.rows
            for rows in parent:
                rows.num_fixed = max(rows.num_fixed, len(rows.ids) // BLOCK_SIZE * BLOCK_SIZE)
            full = [len(rows.ids) // BLOCK_SIZE * BLOCK_SIZE for rows in parent]
            self.rows[child] = [
                Rows(list(rows.ids), rows.next_position, fixed) for rows, fixed in zip(parent, full, strict=True)
            ]

    @precondition(lambda self: self.rows)
    @rule(number=st.integers(0, 9), stage=st.sampled_from(STAGES), first=st.integers(0, 4), count=st.integers(1, 4))
    def hold(self, number: int, stage: int, first: int, count: int) -> None:
        slot = self.slot(number)
        rows = self.rows[slot][stage]
        last = min(first + count, groups_for(len(rows.ids)))
        if first >= last:
            return
        blocks = self.allocator.block_groups(slot, first, last)[stage]
        self.allocator.hold([blocks])
        ids = rows.ids[first * BLOCK_SIZE : last * BLOCK_SIZE]
        self.held.append(Held(stage, blocks, tuple(ids)))
        rows.num_fixed = max(rows.num_fixed, first * BLOCK_SIZE + len(ids))

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 9))
    def release(self, number: int) -> None:
        entry = self.held.pop(number % len(self.held))
        users, unused = self.users(), self.allocator.num_unused_blocks
        without_user = [block for block in entry.blocks.flatten().tolist() if not users[block]]
        assert self.allocator.would_free([entry.blocks]) == (len(without_user) > 0)
        self.allocator.release([entry.blocks])
        assert self.allocator.num_unused_blocks == unused + sum(not self.holds()[block] for block in without_user)

    @precondition(lambda self: self.rows and self.held)
    @rule(number=st.integers(0, 9), entry_number=st.integers(0, 9), fewer=st.integers(0, 3))
    def share(self, number: int, entry_number: int, fewer: int) -> None:
        slot, entry = self.slot(number), self.held[entry_number % len(self.held)]
        rows = self.rows[slot][entry.stage]
        ids = entry.ids[: max(len(entry.ids) - fewer, (entry.blocks.shape[1] - 1) * BLOCK_SIZE + 1)]
        held = {int(block) for block in entry.blocks.flatten()}
        own = self.allocator.block_tables(entry.stage, np.array([slot]))
        if len(rows.ids) % BLOCK_SIZE or len(rows.ids) + len(ids) > 40 or held & set(own.flatten().tolist()):
            return
        copies = GROUPS[entry.stage] if len(ids) % BLOCK_SIZE else 0
        if copies > self.free_without(entry.blocks):
            with pytest.raises(CapacityError):
                self.allocator.share(entry.stage, slot, entry.blocks, len(ids))
            return
        self.allocator.share(entry.stage, slot, entry.blocks, len(ids))
        rows.num_fixed = len(rows.ids) + len(ids) // BLOCK_SIZE * BLOCK_SIZE
        rows.ids += ids
        rows.next_position += len(ids)

    @invariant()
    def blocks_add_up(self) -> None:
        if not hasattr(self, "allocator"):
            return
        allocator, users = self.allocator, self.users()
        held = self.holds()
        assert allocator._num_users.tolist() == [len(slots) + held[block] for block, slots in users.items()]
        assert allocator._num_holds.tolist() == [held[block] for block in users]
        unused = [block for block, slots in users.items() if not slots and not held[block]]
        used = [block for block, slots in users.items() if slots]
        assert all(len(slots) == len(set(slots)) for slots in users.values()), "a block is twice in one sequence"
        assert allocator.num_unused_blocks == len(unused)
        assert allocator.num_free_blocks == allocator.num_blocks - len(used)
        assert sorted(allocator._unused_blocks[: len(unused)].tolist()) == unused
        assert allocator.bytes_in_use == 100 * len(used)
        assert allocator.num_free_slots == allocator.config.max_num_seqs - len(self.rows)

    @invariant()
    def rows_are_as_they_were_written(self) -> None:
        if not hasattr(self, "allocator"):
            return
        for slot, stages in self.rows.items():
            chosen = np.array([slot])
            assert self.allocator.kv_lengths(chosen).tolist() == [[len(rows.ids) for rows in stages]]
            assert self.allocator.next_positions(chosen).tolist() == [[rows.next_position for rows in stages]]
            assert self.allocator.blocks_of(slot) == sum(
                groups_for(len(rows.ids)) * groups for rows, groups in zip(stages, GROUPS, strict=True)
            )
            for stage, rows in enumerate(stages):
                table = self.allocator.block_tables(stage, chosen)[:, 0]
                assert table.shape[1] == max(1, groups_for(len(rows.ids)))
                self.check_contents(table, rows.ids)
        for entry in self.held:
            self.check_contents(entry.blocks, entry.ids)
        padding = np.array([self.allocator.padding_slot])
        assert self.allocator.kv_lengths(padding).tolist() == self.allocator.next_positions(padding).tolist()
        assert self.allocator.kv_lengths(padding).tolist() == [[1] * len(GROUPS)]
        assert (self.contents[self.allocator.padding_block] == -1).all()

    @rule(size=st.integers(0, 30))
    def update_the_tables_on_a_device(self, size: int) -> None:
        indices, blocks = self.on_device.take_changes(size)
        assert len(indices) == len(blocks) == size
        self.on_device.apply(torch.from_numpy(indices), torch.from_numpy(blocks))
        slots = [*self.rows, self.allocator.padding_slot]
        for stage, tables in enumerate(self.on_device.of_slots(torch.tensor(slots))):
            for index, slot in enumerate(slots):
                count = groups_for(self.allocator.kv_lengths(np.array([slot]))[0, stage])
                expected = self.allocator.block_tables(stage, np.array([slot]), whole=True)[:, 0, :count]
                assert tables[:, index, :count].tolist() == expected.tolist()

    def check_contents(self, table: BlockIds, ids: list[int] | tuple[int, ...]) -> None:
        for group, blocks in enumerate(table):
            found = self.contents[blocks].flatten()[: len(ids)]
            assert found.tolist() == [8 * row + group for row in ids]


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
