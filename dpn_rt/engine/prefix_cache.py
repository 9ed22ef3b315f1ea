"""Keys and values of prompts' prefixes, kept for later prompts that begin with the same tokens and image.

There are two kinds of entries. A block of text rows before the image is the same in every stage, whatever follows it.
An image's rows are the same in stage 0 alone: from the first boundary on they depend on the question after the image.
So the entry of an image has its KV blocks of stage 0, and its rows as they left that stage, which the boundary takes as
its input when the next question comes.

The key of an entry is a hash of everything from the prompt's first row to the entry's last, the image's content
included, so two images never share. When KV blocks run out, the least recently used entries are dropped first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dpn_rt.cache.block_allocator import BlockAllocator, BlockIds
from dpn_rt.engine.sequence import Sequence
from dpn_rt.errors import CapacityError

Key = bytes


@dataclass(frozen=True, eq=False)
class Entry:
    """One block of text in all stages, or one image in stage 0."""

    blocks: tuple[BlockIds, ...]
    """Per stage `[layer_groups, num_block_groups]`; of an image stage 0 alone."""
    stage_0_rows: Tensor | None = None
    """`[num_rows, hidden_size]` of an image: the rows from the first after the text blocks to the image's last, as they
    left stage 0; None where no boundary follows."""

    @property
    def row_bytes(self) -> int:
        """Memory of `stage_0_rows`."""
        return 0 if self.stage_0_rows is None else self.stage_0_rows.nbytes


@dataclass(frozen=True)
class Match:
    """The entries that a prompt begins with."""

    text: tuple[Entry, ...]
    """Of its first rows, one whole block each."""
    image: Entry | None


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """The rows of a prompt that are in the cache, from its first row on."""

    num_rows: int = 0
    """Rows of text that every stage has."""
    num_stage_0_rows: int = 0
    """Rows after them that stage 0 alone has; they end with the image's last row."""
    stage_0_rows: Tensor | None = None
    """`[num_stage_0_rows, hidden_size]`: these rows as they left stage 0; None where no boundary follows."""


@dataclass
class PrefixStatistics:
    """Since the start."""

    queried_rows: int = 0
    """Rows of prompts at stage 0."""
    hit_rows: int = 0
    """Of these, rows that were in the cache."""
    image_queries: int = 0
    image_hits: int = 0
    evictions: int = 0


class PrefixCache:
    """Entries by their keys, and the KV blocks that they hold."""

    def __init__(self, allocator: BlockAllocator, max_row_bytes: int) -> None:
        """
        Args:
            allocator: of the KV blocks; asks for held ones when it needs them.
            max_row_bytes: of all entries' `stage_0_rows`.
        """
        self._allocator, self._max_row_bytes = allocator, max_row_bytes
        self._block_size = allocator.config.block_size
        self._entries: OrderedDict[Key, Entry] = OrderedDict()  # least recently used first
        self._row_bytes = 0
        self.statistics = PrefixStatistics()
        allocator.reclaim = self._evict

    def __len__(self) -> int:
        return len(self._entries)

    def share(self, sequence: Sequence) -> CachedPrefix:
        """Gives a sequence the KV blocks of its prompt's cached prefix. At least one row is always left to compute.

        Args:
            sequence: with an empty slot.
        """
        assert sequence.slot is not None
        match = self._match(sequence)
        for entry in match.text:
            for stage, blocks in enumerate(entry.blocks):
                self._allocator.share(stage, sequence.slot, blocks, self._block_size)
        num_text_rows = len(match.text) * self._block_size
        if match.image is None:
            return CachedPrefix(num_text_rows)
        num_rows = sequence.image_end - num_text_rows
        try:
            self._allocator.share(0, sequence.slot, match.image.blocks[0], num_rows)
        except CapacityError:
            return CachedPrefix(num_text_rows)  # sharing may take one block group more than computing does
        return CachedPrefix(num_text_rows, num_rows, match.image.stage_0_rows)

    def rows_to_keep(self, sequence: Sequence, num_cached: int) -> tuple[int, int]:
        """Which rows `insert` wants as they leave stage 0.

        Args:
            sequence: in prefill.
            num_cached: rows of its prompt that were in the cache.

        Returns:
            First and last (excluded) of them, counted from the first row that was not in the cache; (0, 0) without an
            image.
        """
        if not sequence.image_starts:
            return 0, 0
        num_text_rows = sequence.image_starts[0] // self._block_size * self._block_size
        return num_text_rows - num_cached, sequence.image_end - num_cached

    def insert(self, sequence: Sequence, stage_0_rows: Tensor | None) -> None:
        """Keeps the prefix of a sequence that has just been prefilled and still has its slot.

        Args:
            sequence: with its KV blocks filled.
            stage_0_rows: see `Entry`; None without an image, or where no boundary follows stage 0.
        """
        assert sequence.slot is not None
        keys = _Keys.of(sequence, self._block_size)
        for index, key in enumerate(keys.text):
            if key not in self._entries:
                self._add(key, Entry(self._allocator.block_groups(sequence.slot, index, index + 1)))
        if keys.image is not None and keys.image not in self._entries:
            last = -(-keys.image_end // self._block_size)
            blocks = self._allocator.block_groups(sequence.slot, len(keys.text), last)[:1]
            self._add(keys.image, Entry(blocks, stage_0_rows))

    def clear(self) -> None:
        """Drops all entries."""
        for key in list(self._entries):
            self._remove(key)

    def _match(self, sequence: Sequence) -> Match:
        """The entries of a sequence's prompt, counted as used now."""
        keys = _Keys.of(sequence, self._block_size)
        text = []
        for key in keys.text:
            entry = self._find(key)
            if entry is None:
                break
            text.append(entry)
        image = None
        if keys.image is not None:
            self.statistics.image_queries += 1
            if len(text) == len(keys.text):
                image = self._find(keys.image)
            self.statistics.image_hits += image is not None
        self.statistics.queried_rows += sequence.num_rows
        self.statistics.hit_rows += len(text) * self._block_size if image is None else keys.image_end
        return Match(tuple(text), image)

    def _find(self, key: Key) -> Entry | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def _add(self, key: Key, entry: Entry) -> None:
        self._entries[key] = entry
        self._allocator.hold(entry.blocks)
        self._row_bytes += entry.row_bytes
        while self._row_bytes > self._max_row_bytes:
            self._remove(next(key for key, other in self._entries.items() if other.row_bytes))
            self.statistics.evictions += 1

    def _evict(self, num_blocks: int) -> None:
        """Frees at least `num_blocks` KV blocks, or all that no sequence uses."""
        goal = self._allocator.num_unused_blocks + num_blocks
        for key, entry in list(self._entries.items()):
            if self._allocator.num_unused_blocks >= goal:
                return
            if self._allocator.would_free(entry.blocks):
                self._remove(key)
                self.statistics.evictions += 1

    def _remove(self, key: Key) -> None:
        entry = self._entries.pop(key)
        self._row_bytes -= entry.row_bytes
        self._allocator.release(entry.blocks)


@dataclass(frozen=True)
class _Keys:
    """Under which keys the entries of one prompt are kept."""

    text: tuple[Key, ...]
    """One for each whole block of text before the image; in a prompt without one, before its last row."""
    image: Key | None
    image_end: int = 0
    """The row after the image's last."""

    @classmethod
    def of(cls, sequence: Sequence, block_size: int) -> _Keys:
        prompt = sequence.prompt
        visual, start = prompt.visual, prompt.image_index
        ids = prompt.token_ids
        text = ids if visual is None or start is None else ids[:start]
        # The last row must be computed, since its logits choose the first token: it is never part of an entry. So a
        # prompt that ends with its image has no entry for it.
        num_blocks = (len(ids) - 1 if visual is None else len(text)) // block_size
        keys = list(_chain(text[i * block_size : (i + 1) * block_size] for i in range(num_blocks)))
        if visual is None or start is None or start == len(ids) - 1:
            return cls(tuple(keys), None)
        rest = text[num_blocks * block_size :]
        before = keys[-1] if keys else b""
        image = hashlib.sha256(b"image" + before + rest.tobytes() + b"|" + visual.key).digest()
        return cls(tuple(keys), image, start + visual.num_visual_tokens)


def _chain(blocks: Iterable[np.ndarray]) -> Iterable[Key]:
    """A key for each block of token ids, which depends on all blocks before it too."""
    key = b""
    for block in blocks:
        key = hashlib.sha256(b"text" + key + block.tobytes()).digest()
        yield key
