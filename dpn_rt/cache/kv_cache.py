"""Paged keys and values: one pool of cells for all stages, one length per stage and sequence.

A cell holds `block_size` rows of K and V for a group of layers, as many as divide every stage evenly (the greatest
common divisor of the stage sizes), so a cell that one stage frees serves any other. A sequence owns a slot; the block
tables and lengths of all slots are arrays, so that a step over many sequences is a few array operations.

Cells are counted: several sequences may read one, and what is held for sequences to come is given back when cells run
out (`reclaim`). Only the one that fills a cell writes to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt.device.device import Device
from dpn_rt.device.host import HostDevice
from dpn_rt.errors import CapacityError
from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.layout import IntArray

Slots = npt.NDArray[np.intp]
CellArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class KvCacheConfig:
    """Shape of the pool."""

    num_cells: int
    block_size: int
    num_slots: int
    """Sequences that can hold cells at one time."""
    max_length: int
    """Rows of one sequence in one stage, at most."""


@dataclass(frozen=True)
class KvGeometry:
    """How layers share cells."""

    stage_sizes: tuple[int, ...]
    """Layers per stage."""
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of_model(cls, decoder: DecoderConfig, stage_layers: Sequence[range], dtype: torch.dtype) -> KvGeometry:
        sizes = tuple(len(layers) for layers in stage_layers)
        return cls(sizes, decoder.num_kv_heads, decoder.head_dim, dtype)

    @property
    def layers_per_cell(self) -> int:
        return math.gcd(*self.stage_sizes)

    @property
    def groups(self) -> tuple[int, ...]:
        """Cells that one block of rows takes in each stage."""
        return tuple(size // self.layers_per_cell for size in self.stage_sizes)

    def cell_shape(self, block_size: int) -> tuple[int, int, int, int, int]:
        """`[layers_per_cell, 2, num_kv_heads, block_size, head_dim]`; index 0 of dimension 1 is K, index 1 is V."""
        return self.layers_per_cell, 2, self.num_kv_heads, block_size, self.head_dim

    def cell_bytes(self, block_size: int) -> int:
        return math.prod(self.cell_shape(block_size)) * self.dtype.itemsize

    def cells_for(self, lengths: tuple[int, ...] | IntArray, block_size: int) -> int:
        """Cells of one sequence with `lengths` rows per stage."""
        return sum(groups * -(-int(length) // block_size) for groups, length in zip(self.groups, lengths, strict=True))


class KvCache:
    """The pool, and who owns which cell."""

    def __init__(self, geometry: KvGeometry, config: KvCacheConfig, device: Device | None = None) -> None:
        """An empty pool on `device`; None: the host.

        Raises:
            CapacityError: the device has too little memory.
        """
        self.geometry = geometry
        self.config = config
        self._device = device or HostDevice()
        padding_cell = config.num_cells
        shape = (padding_cell + 1, *geometry.cell_shape(config.block_size))
        max_blocks = -(-config.max_length // config.block_size)
        try:
            self.cells: Tensor = self._device.pool(shape, geometry.dtype)
            """`[num_cells + 1, layers_per_cell, 2, num_kv_heads, block_size, head_dim]`."""
            self._tables = [
                np.full((groups, config.num_slots + 1, max_blocks), -1, dtype=np.int32) for groups in geometry.groups
            ]
        except (RuntimeError, MemoryError) as error:
            num_bytes = config.num_cells * geometry.cell_bytes(config.block_size)
            raise CapacityError(
                f"the memory has no room for a KV cache of {num_bytes:,} bytes and tables for {config.num_slots} "
                "sequences: lower kv_cache_bytes or max_num_seqs"
            ) from error
        self.padding_slot = config.num_slots
        """Fills up batches: always one row in every stage, in a cell that no sequence gets."""
        self._lengths = np.zeros((config.num_slots + 1, len(geometry.stage_sizes)), dtype=np.int32)
        self._lengths[self.padding_slot] = 1
        for table in self._tables:
            table[:, self.padding_slot, 0] = padding_cell
        self._users = np.zeros(config.num_cells, dtype=np.int32)  # of each cell: sequences, and `hold`
        self._is_held = np.zeros(config.num_cells, dtype=bool)
        self.reclaim: Callable[[int], None] | None = None
        """Asked to `release` so many cells when too few are unused."""
        self._free_cells = np.arange(config.num_cells, dtype=np.int32)[::-1].copy()
        self._num_free_cells = config.num_cells
        self._free_slots = list(range(config.num_slots))[::-1]

    @property
    def num_unused_cells(self) -> int:
        """Cells that nobody has."""
        return self._num_free_cells

    @property
    def num_free_cells(self) -> int:
        """Cells that a sequence could get: unused ones, and those that are only held."""
        return self._num_free_cells + int(np.count_nonzero(self._is_held & (self._users == 1)))

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    @property
    def bytes_in_use(self) -> int:
        cells = self.config.num_cells - self.num_free_cells
        return cells * self.geometry.cell_bytes(self.config.block_size)

    def check_fits(self, lengths: tuple[int, ...], max_tokens: int) -> None:
        """A sequence with `lengths` rows per stage must fit into the empty pool.

        Raises:
            CapacityError: it does not.
        """
        cells = self.cells_for(lengths)
        if cells > self.config.num_cells or max(lengths) > self.config.max_length:
            cell_bytes = self.geometry.cell_bytes(self.config.block_size)
            raise CapacityError(
                f"the request needs up to {cells} KV cells ({lengths} rows per stage with max_tokens={max_tokens}), "
                f"the cache has {self.config.num_cells}: raise kv_cache_bytes to at least {cells * cell_bytes}, "
                "or shorten prompt or max_tokens"
            )

    def cells_for(self, lengths: tuple[int, ...] | IntArray) -> int:
        """Cells of one sequence with `lengths` rows per stage."""
        return self.geometry.cells_for(lengths, self.config.block_size)

    def cells_of(self, slot: int) -> int:
        """Cells that a slot holds."""
        return self.geometry.cells_for(self._lengths[slot], self.config.block_size)

    def open_slot(self) -> int:
        """A slot for a sequence; all its lengths are 0.

        Raises:
            CapacityError: every slot is taken.
        """
        if not self._free_slots:
            raise CapacityError(f"all {self.config.num_slots} sequence slots of the KV cache are taken")
        return self._free_slots.pop()

    def close_slot(self, slot: int) -> None:
        """Gives the slot and all its cells back."""
        for stage, table in enumerate(self._tables):
            blocks = self._blocks(self._lengths[slot, stage])
            self._give_back(table[:, slot, :blocks].reshape(-1))
            table[:, slot, :blocks] = -1
        self._lengths[slot] = 0
        self._free_slots.append(slot)

    # Sharing

    def fork(self, slot: int, max_cells: int) -> int | None:
        """A new slot with the same rows, which shares the full blocks; a last block that is not full is copied.

        None where the copies take more than `max_cells` cells.
        """
        partial = self._lengths[slot] % self.config.block_size != 0
        cells = int((partial * np.asarray(self.geometry.groups)).sum())
        if cells > max_cells:
            return None
        self._require(cells)
        child = self.open_slot()
        for stage, table in enumerate(self._tables):
            num_rows = int(self._lengths[slot, stage])
            num_blocks = -(-num_rows // self.config.block_size)
            self.share(stage, child, table[:, slot, :num_blocks].copy(), num_rows)
        return child

    def cells_of_blocks(self, slot: int, first: int, last: int) -> tuple[CellArray, ...]:
        """Per stage `[groups, last - first]`: the cells of some of a slot's blocks."""
        return tuple(table[:, slot, first:last].copy() for table in self._tables)

    def hold(self, cells: Iterable[CellArray]) -> None:
        """Keeps cells beyond the sequences that use them, until `release`."""
        for array in cells:
            self._users[array] += 1
            self._is_held[array] = True

    def release(self, cells: Iterable[CellArray]) -> None:
        """Ends `hold`."""
        for array in cells:
            self._is_held[array] = False
            self._give_back(array.reshape(-1))

    def are_idle(self, cells: Iterable[CellArray]) -> bool:
        """Whether some of these cells would be unused after `release`."""
        return any(bool((self._users[array] == 1).any()) for array in cells)

    def share(self, stage: int, slot: int, cells: CellArray, num_rows: int) -> None:
        """Appends rows that are in the cache already to a stage of a slot whose rows so far fill whole blocks.

        Args:
            stage: of the rows.
            slot: that gets them.
            cells: `[groups, num_blocks]` that hold them.
            num_rows: more than `num_blocks - 1` blocks hold. A last block that is not full is copied, since the
                sequence goes on to write behind these rows.

        Raises:
            CapacityError: there is no free cell for that copy; the slot is as it was.
        """
        first = int(self._lengths[slot, stage]) // self.config.block_size
        whole = num_rows // self.config.block_size
        self._users[cells] += 1  # none is to be reclaimed for the sake of another
        if num_rows % self.config.block_size:
            try:
                self._require(len(cells))
            except CapacityError:
                self._give_back(cells.reshape(-1))
                raise
        self._tables[stage][:, slot, first : first + whole] = cells[:, :whole]
        self._lengths[slot, stage] += whole * self.config.block_size
        if num_rows % self.config.block_size:
            self._assign(stage, np.array([slot]), np.array([first + whole]))
            source, target = self._device.upload(cells[:, whole], self._tables[stage][:, slot, first + whole])
            self.cells.index_copy_(0, target.long(), self.cells.index_select(0, source))
            self._give_back(cells[:, whole])
            self._lengths[slot, stage] += num_rows % self.config.block_size

    # Filling

    def lengths(self, slots: Slots) -> IntArray:
        """`[num_seqs, num_stages]` rows held."""
        return self._lengths[slots]

    def cells_to_grow(self, slots: Slots) -> int:
        """Free cells needed to add one row to every stage of each of `slots`."""
        full = self._lengths[slots] % self.config.block_size == 0
        return int((full.sum(axis=0) * np.asarray(self.geometry.groups)).sum())

    def grow(self, slots: Slots) -> None:
        """Makes room for one more row in every stage of each of `slots` (`cells_to_grow` cells)."""
        self._require(self.cells_to_grow(slots))
        for stage in range(len(self._tables)):
            lengths = self._lengths[slots, stage]
            full = lengths % self.config.block_size == 0
            self._assign(stage, slots[full], lengths[full] // self.config.block_size)
        self._lengths[slots] += 1

    def fill_stage(self, stage: int, slots: Slots, lengths: IntArray) -> None:
        """Makes room for `lengths` `[num_seqs]` rows of a stage in all, beyond those that it holds."""
        owners, blocks = self._blocks_between(slots, self._lengths[slots, stage], lengths)
        self._require(len(blocks) * self.geometry.groups[stage])
        self._assign(stage, owners, blocks)
        self._lengths[slots, stage] = lengths

    def has_unused_for(self, stage: int, slots: Slots, lengths: IntArray) -> bool:
        """Whether `fill_stage` would find enough cells that nobody has."""
        missing = self._blocks(lengths) - self._blocks(self._lengths[slots, stage])
        return int(missing.sum()) * self.geometry.groups[stage] <= self._num_free_cells

    def trim_stage(self, stage: int, slots: Slots, lengths: IntArray) -> None:
        """Gives back what a stage holds beyond `lengths` `[num_seqs]` rows; who holds less keeps that."""
        held = self._lengths[slots, stage]
        kept = np.minimum(held, lengths)
        owners, blocks = self._blocks_between(slots, kept, held)
        table = self._tables[stage]
        self._give_back(table[:, owners, blocks].reshape(-1)[::-1])
        table[:, owners, blocks] = -1
        self._lengths[slots, stage] = kept

    def block_tables(self, stage: int, slots: Slots, *, whole: bool = False) -> IntArray:
        """`[groups, num_seqs, max_blocks]`: cells of each sequence, -1 behind its last.

        max_blocks is what the longest of these sequences needs, or with `whole` what any sequence may need.
        """
        table = self._tables[stage]
        longest = int(self._lengths[slots, stage].max(initial=0))
        blocks = table.shape[2] if whole else max(1, -(-longest // self.config.block_size))
        return np.ascontiguousarray(table[:, slots, :blocks])

    def _blocks(self, lengths: IntArray) -> IntArray:
        blocks: IntArray = -(-lengths // self.config.block_size)
        return blocks

    def _blocks_between(
        self, slots: Slots, shorter: IntArray, longer: IntArray
    ) -> tuple[Slots, npt.NDArray[np.integer]]:
        """The blocks that `longer` rows of each slot take beyond those of `shorter`: whose they are, and which."""
        first = self._blocks(shorter)
        counts = self._blocks(longer) - first
        before = np.cumsum(counts) - counts
        return np.repeat(slots, counts), np.arange(int(counts.sum())) - np.repeat(before - first, counts)

    def _require(self, cells: int) -> None:
        if cells > self._num_free_cells and self.reclaim is not None:
            self.reclaim(cells - self._num_free_cells)
        if cells > self._num_free_cells:
            raise CapacityError(f"the KV cache has {self._num_free_cells} free cells, {cells} are needed")

    def _assign(self, stage: int, slots: Slots, blocks: npt.NDArray[np.integer]) -> None:
        table = self._tables[stage]
        count = table.shape[0] * len(slots)
        self._num_free_cells -= count
        # The one freed last comes first: what is trimmed is then what has been unused for longest.
        cells = self._free_cells[self._num_free_cells : self._num_free_cells + count][::-1]
        self._users[cells] = 1
        table[:, slots, blocks] = cells.reshape(table.shape[0], len(slots))

    def _give_back(self, cells: CellArray) -> None:
        """One user less for each of `cells`, which are all different."""
        self._users[cells] -= 1
        unused = cells[self._users[cells] == 0]
        self._free_cells[self._num_free_cells : self._num_free_cells + len(unused)] = unused
        self._num_free_cells += len(unused)
