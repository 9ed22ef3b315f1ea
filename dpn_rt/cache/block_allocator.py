"""Which KV blocks belong to which sequence: host arrays of block ids, no tensors (`kv_pool.py` has those).

A KV block holds `block_size` rows of keys and values of one layer group. In a stage, the blocks of all its layer groups
for the same rows of a sequence form a block group; a sequence takes and frees whole block groups. Each sequence owns a
slot. Block tables and lengths of all slots are arrays, so a step over many sequences takes a few array operations.

Every block has a number of users. Several sequences may read one block, and `hold` keeps blocks for later sequences;
when blocks run out, `reclaim` asks for held ones. A block is written only by the sequence that fills it; another one
that goes on from a partly filled block gets a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpn_rt.errors import CapacityError
from dpn_rt.model.layout import IntArray

Slots = npt.NDArray[np.intp]
BlockIds = npt.NDArray[np.int32]
CopyBlocks = Callable[[BlockIds, BlockIds], None]
"""Copies the contents of blocks `sources` `[num_copies]` to blocks `targets` `[num_copies]`, in every pool."""
NoteTables = Callable[[int, Slots, npt.NDArray[np.integer]], None]
"""Is told that a stage's block tables have new blocks: for each pair of slot and index, in every layer group."""


@dataclass(frozen=True)
class AllocatorConfig:
    """What there is to allocate."""

    num_blocks: int
    block_size: int
    """Rows per block."""
    max_num_seqs: int
    """Slots: sequences that can have blocks at one time."""
    max_model_len: int
    """Rows of one sequence in one stage, at most."""
    layer_groups: tuple[int, ...]
    """Layer groups of each stage, so KV blocks per block group."""
    block_bytes: int
    """Bytes of one block."""


class BlockAllocator:
    """Slots, block tables, lengths and free blocks of all sequences of an engine."""

    def __init__(self, config: AllocatorConfig, copy_blocks: CopyBlocks) -> None:
        """
        Args:
            config: what there is to allocate.
            copy_blocks: called as soon as the targets are taken, and before anything is written to the sources.

        Raises:
            CapacityError: the host has no memory for the block tables.
        """
        self.config = config
        self._copy_blocks = copy_blocks
        self._group_sizes = np.asarray(config.layer_groups)
        num_slots, num_stages = config.max_num_seqs, len(config.layer_groups)
        max_block_groups = -(-config.max_model_len // config.block_size)
        self.padding_slot = num_slots
        """Fills up batches: always one row in every stage, in a block that no sequence gets."""
        self.padding_block = config.num_blocks
        try:
            self.all_tables = np.full((sum(config.layer_groups), num_slots + 1, max_block_groups), -1, dtype=np.int32)
            """`[all layer groups, num_slots + 1, max_block_groups]` block tables of all stages and slots; read only."""
            self._kv_lengths = np.zeros((num_slots + 1, num_stages), dtype=np.int32)
        except MemoryError as error:
            raise CapacityError(
                f"the memory has no room for block tables for {num_slots} sequences: lower max_num_seqs"
            ) from error
        self._tables = np.split(self.all_tables, np.cumsum(config.layer_groups)[:-1])  # views, one for each stage
        self._kv_lengths[self.padding_slot] = 1
        self._next_positions = self._kv_lengths.copy()
        for table in self._tables:
            table[:, self.padding_slot, 0] = self.padding_block
        self._num_users = np.zeros(config.num_blocks, dtype=np.int32)  # of each block: sequences, and holds
        self._num_holds = np.zeros(config.num_blocks, dtype=np.int32)
        self._total_holds = 0
        self._unused_blocks = np.arange(config.num_blocks, dtype=np.int32)[::-1].copy()  # a stack
        self._num_unused_blocks = config.num_blocks
        self._free_slots = list(range(num_slots))[::-1]
        self.reclaim: Callable[[int], None] | None = None
        """Called with the number of blocks that are missing; releases held ones."""
        self.note_tables: NoteTables | None = None
        """Called when block tables have new blocks, for copies of them elsewhere."""

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self.config.num_blocks

    @property
    def num_unused_blocks(self) -> int:
        """Blocks without any user."""
        return self._num_unused_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that a sequence could get: unused ones, and those that are only held."""
        if not self._total_holds:  # every step asks, and there may be many blocks
            return self._num_unused_blocks
        return self._num_unused_blocks + int(np.count_nonzero(self._is_held_only(slice(None))))

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the blocks that sequences use."""
        return (self.num_blocks - self.num_free_blocks) * self.config.block_bytes

    def check_fits(self, lengths: Sequence[int], max_tokens: int) -> None:
        """A sequence with `lengths` rows per stage must fit into the empty pool.

        Raises:
            CapacityError: it does not.
        """
        num_blocks = self.blocks_for(lengths)
        if num_blocks > self.num_blocks or max(lengths) > self.config.max_model_len:
            raise CapacityError(
                f"the request needs up to {num_blocks} KV blocks ({lengths} rows per stage with "
                f"max_tokens={max_tokens}), the cache has {self.num_blocks}: raise kv_cache_bytes to at least "
                f"{num_blocks * self.config.block_bytes}, or shorten prompt or max_tokens"
            )

    def blocks_for(self, lengths: Sequence[int]) -> int:
        """Blocks of one sequence with `lengths` rows per stage."""
        return count_blocks(lengths, self.config.layer_groups, self.config.block_size)

    def blocks_of(self, slot: int) -> int:
        """Blocks that a slot uses."""
        return self.blocks_for(self._kv_lengths[slot].tolist())

    def open_slot(self) -> int:
        """A slot for a sequence, without rows.

        Raises:
            CapacityError: every slot is taken.
        """
        if not self._free_slots:
            raise CapacityError(f"all {self.config.max_num_seqs} sequence slots of the KV cache are taken")
        return self._free_slots.pop()

    def close_slot(self, slot: int) -> None:
        """Gives the slot and all its blocks back."""
        for stage, table in enumerate(self._tables):
            count = self._num_groups(int(self._kv_lengths[slot, stage]))
            self._give_back(table[:, slot, :count].reshape(-1))
            table[:, slot, :count] = -1
        self._kv_lengths[slot] = self._next_positions[slot] = 0
        self._free_slots.append(slot)

    # Sharing

    def fork(self, slot: int, max_blocks: int) -> int | None:
        """A new slot with the same rows. It shares the full blocks; a last block that is not full is copied.

        None where the copies take more than `max_blocks` blocks.
        """
        is_partial = self._kv_lengths[slot] % self.config.block_size != 0
        num_copies = int((is_partial * self._group_sizes).sum())
        if num_copies > max_blocks:
            return None
        self._require(num_copies)
        child = self.open_slot()
        try:
            for stage, table in enumerate(self._tables):
                num_rows = int(self._kv_lengths[slot, stage])
                self.share(stage, child, table[:, slot, : self._num_groups(num_rows)].copy(), num_rows)
        except Exception:
            self.close_slot(child)
            raise
        self._next_positions[child] = self._next_positions[slot]
        return child

    def block_groups(self, slot: int, first: int, last: int) -> tuple[BlockIds, ...]:
        """Per stage `[layer_groups, last - first]`: the blocks of a slot's block groups from `first` to `last`."""
        return tuple(table[:, slot, first:last].copy() for table in self._tables)

    def hold(self, blocks: Iterable[BlockIds]) -> None:
        """Keeps blocks, whether or not a sequence uses them, until `release`; a block may be held several times."""
        for ids in blocks:
            self._num_users[ids] += 1
            self._num_holds[ids] += 1
            self._total_holds += ids.size

    def release(self, blocks: Iterable[BlockIds]) -> None:
        """Ends a `hold`."""
        for ids in blocks:
            self._num_holds[ids] -= 1
            self._total_holds -= ids.size
            self._give_back(ids.reshape(-1))

    def would_free(self, blocks: Iterable[BlockIds]) -> bool:
        """Whether any of these held blocks has no user when its holds are released."""
        return any(bool(self._is_held_only(ids).any()) for ids in blocks)

    def share(self, stage: int, slot: int, blocks: BlockIds, num_rows: int) -> None:
        """Appends rows that are in the cache already to a stage of a slot whose last block is full.

        Args:
            stage: of the rows.
            slot: that gets them.
            blocks: `[layer_groups, num_block_groups]` that hold them.
            num_rows: more than `num_block_groups - 1` block groups hold. A last block group that is not full is copied,
                since the sequence will write its next rows there.

        Raises:
            CapacityError: there is no free block for that copy; the slot is as it was.
        """
        first = int(self._kv_lengths[slot, stage]) // self.config.block_size
        num_full, num_rest = divmod(num_rows, self.config.block_size)
        self._num_users[blocks] += 1  # so that none of them is reclaimed to make room for the copy
        if num_rest:
            try:
                self._require(len(blocks))
            except CapacityError:
                self._give_back(blocks.reshape(-1))
                raise
        table = self._tables[stage]
        table[:, slot, first : first + num_full] = blocks[:, :num_full]
        self._note(stage, np.full(num_full, slot), np.arange(first, first + num_full))
        self._kv_lengths[slot, stage] += num_rows
        self._next_positions[slot, stage] += num_rows
        if num_rest:
            partial, target = blocks[:, num_full], first + num_full
            self._assign(stage, np.array([slot]), np.array([target]))
            try:
                self._copy_blocks(partial, table[:, slot, target])
            finally:
                self._give_back(partial)

    # Filling

    def kv_lengths(self, slots: Slots) -> IntArray:
        """`[num_seqs, num_stages]` rows in the cache."""
        return self._kv_lengths[slots]

    def next_positions(self, slots: Slots) -> IntArray:
        """`[num_seqs, num_stages]` rotary position of the next row."""
        return self._next_positions[slots]

    def blocks_to_grow(self, slots: Slots) -> int:
        """Free blocks needed to add one row to every stage of each of `slots`."""
        is_full = self._kv_lengths[slots] % self.config.block_size == 0
        return int((is_full.sum(axis=0) * self._group_sizes).sum())

    def grow(self, slots: Slots) -> None:
        """Adds one row to every stage of each of `slots`; takes `blocks_to_grow` blocks."""
        self._require(self.blocks_to_grow(slots))
        for stage in range(len(self._tables)):
            lengths = self._kv_lengths[slots, stage]
            is_full = lengths % self.config.block_size == 0
            self._assign(stage, slots[is_full], lengths[is_full] // self.config.block_size)
        self._kv_lengths[slots] += 1
        self._next_positions[slots] += 1

    def fill_stage(self, stage: int, slots: Slots, lengths: IntArray, next_positions: IntArray | None = None) -> None:
        """Makes room in a stage for `lengths` `[num_seqs]` rows in all, at least as many as it has.

        Args:
            stage: of the rows.
            slots: `[num_seqs]`.
            lengths: `[num_seqs]` rows.
            next_positions: `[num_seqs]` rotary position of the row after them; None: `lengths`, as in a stage that
                numbers its rows from 0.

        Raises:
            CapacityError: too few blocks are free; nothing has changed.
        """
        owners, indices = self._groups_between(slots, self._kv_lengths[slots, stage], lengths)
        self._require(len(indices) * self.config.layer_groups[stage])
        self._assign(stage, owners, indices)
        self._kv_lengths[slots, stage] = lengths
        self._next_positions[slots, stage] = lengths if next_positions is None else next_positions

    def has_unused_for(self, stage: int, slots: Slots, lengths: IntArray) -> bool:
        """Whether unused blocks are enough for `fill_stage`: no held block would be reclaimed."""
        missing = self._group_counts(lengths) - self._group_counts(self._kv_lengths[slots, stage])
        return int(missing.sum()) * self.config.layer_groups[stage] <= self._num_unused_blocks

    def trim_stage(self, stage: int, slots: Slots, lengths: IntArray, next_positions: IntArray | None = None) -> None:
        """Gives back the rows of a stage after its first `lengths` `[num_seqs]`; a slot with fewer rows keeps them.

        Args:
            stage: of the rows.
            slots: `[num_seqs]`.
            lengths: `[num_seqs]` rows to keep.
            next_positions: `[num_seqs]` as in `fill_stage`; None: the number of rows that are left.
        """
        held = self._kv_lengths[slots, stage]
        kept = np.minimum(held, lengths)
        owners, indices = self._groups_between(slots, kept, held)
        table = self._tables[stage]
        self._give_back(table[:, owners, indices].reshape(-1)[::-1])
        table[:, owners, indices] = -1
        self._kv_lengths[slots, stage] = kept
        self._next_positions[slots, stage] = kept if next_positions is None else next_positions

    def block_tables(self, stage: int, slots: Slots, *, whole: bool = False) -> BlockIds:
        """`[layer_groups, num_seqs, max_block_groups]`: blocks of each sequence, -1 after its last.

        max_block_groups is what the longest of these sequences needs, or with `whole` what any sequence may need.
        """
        table = self._tables[stage]
        longest = int(self._kv_lengths[slots, stage].max(initial=0))
        width = table.shape[2] if whole else max(1, self._num_groups(longest))
        return np.ascontiguousarray(table[:, slots, :width])

    def _num_groups(self, length: int) -> int:
        """Block groups that hold `length` rows."""
        return -(-length // self.config.block_size)

    def _group_counts(self, lengths: IntArray) -> IntArray:
        """As `_num_groups`, for each of `lengths` `[num_seqs]`."""
        counts: IntArray = -(-lengths // self.config.block_size)
        return counts

    def _groups_between(
        self, slots: Slots, shorter: IntArray, longer: IntArray
    ) -> tuple[Slots, npt.NDArray[np.integer]]:
        """The block groups that `longer` rows of each slot take beyond those of `shorter`: slot and index of each."""
        first = self._group_counts(shorter)
        counts = self._group_counts(longer) - first
        before = np.cumsum(counts) - counts
        return np.repeat(slots, counts), np.arange(int(counts.sum())) - np.repeat(before - first, counts)

    def _is_held_only(self, ids: BlockIds | slice) -> npt.NDArray[np.bool_]:
        """Whether blocks are held, and no sequence uses them."""
        holds: npt.NDArray[np.int32] = self._num_holds[ids]
        return np.asarray((holds > 0) & (holds == self._num_users[ids]))

    def _require(self, num_blocks: int) -> None:
        if num_blocks > self._num_unused_blocks and self.reclaim is not None:
            self.reclaim(num_blocks - self._num_unused_blocks)
        if num_blocks > self._num_unused_blocks:
            raise CapacityError(f"the KV cache has {self._num_unused_blocks} free blocks, {num_blocks} are needed")

    def _assign(self, stage: int, slots: Slots, indices: npt.NDArray[np.integer]) -> None:
        """Takes an unused block group for each pair of slot and index."""
        table = self._tables[stage]
        count = table.shape[0] * len(slots)
        self._num_unused_blocks -= count
        # The block freed last is taken first, so that `trim_stage` gives back those that were unused for longest.
        blocks = self._unused_blocks[self._num_unused_blocks : self._num_unused_blocks + count][::-1]
        self._num_users[blocks] = 1
        table[:, slots, indices] = blocks.reshape(table.shape[0], len(slots))
        self._note(stage, slots, indices)

    def _note(self, stage: int, slots: Slots, indices: npt.NDArray[np.integer]) -> None:
        if self.note_tables is not None and len(slots):
            self.note_tables(stage, slots, indices)

    def _give_back(self, blocks: BlockIds) -> None:
        """One user less for each of `blocks`, which are all different."""
        self._num_users[blocks] -= 1
        unused = blocks[self._num_users[blocks] == 0]
        self._unused_blocks[self._num_unused_blocks : self._num_unused_blocks + len(unused)] = unused
        self._num_unused_blocks += len(unused)


def count_blocks(lengths: Sequence[int], layer_groups: Sequence[int], block_size: int) -> int:
    """KV blocks of one sequence with `lengths` rows per stage."""
    return sum(groups * -(-length // block_size) for groups, length in zip(layer_groups, lengths, strict=True))
