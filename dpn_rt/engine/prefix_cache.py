"""Keys and values of prompts' beginnings, kept for the next prompt that begins alike.

Two kinds. Blocks of text rows at the very beginning are the same in every stage, whatever follows. An image's rows are
the same in stage 0 alone: what becomes of them after a boundary depends on the question that follows. So for an image
the blocks of stage 0 are kept, and its rows as they left that stage, where the next question's boundary takes them up.

Entries are found by hashes of everything before them, the image's content included; two images never share. The least
recently used entries go first when blocks are needed.
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
    """Per stage `[groups, num_blocks]`; of an image stage 0 alone."""
    stage_0_rows: Tensor | None = None
    """`[num_rows, hidden_size]` of an image: rows from the first after the text blocks to the image's last, as they
    left stage 0; None where there is no boundary."""


@dataclass(frozen=True)
class Match:
    """What of a prompt is in the cache."""

    num_text_rows: int = 0
    """At the beginning, in every stage: whole blocks."""
    blocks: tuple[Entry, ...] = ()
    image: Entry | None = None

    @property
    def hit(self) -> bool:
        return bool(self.blocks) or self.image is not None


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
    """Entries, and the blocks that they hold in the pool."""

    def __init__(self, cache: BlockAllocator, max_row_bytes: int) -> None:
        """`max_row_bytes`: of the rows that are kept beside the blocks."""
        self._max_row_bytes = max_row_bytes
        self.cache = cache
        """Whose blocks it holds."""
        self._entries: OrderedDict[Key, Entry] = OrderedDict()  # least recently used first
        self._row_bytes = 0
        self.statistics = PrefixStatistics()
        cache.reclaim = self._evict

    def __len__(self) -> int:
        return len(self._entries)

    def match(self, sequence: Sequence) -> Match:
        """What of a sequence's prompt is in the cache. At least one row is always left to compute."""
        keys = _Keys.of(sequence, self.cache.config.block_size)
        blocks = []
        for key in keys.blocks:
            entry = self._touch(key)
            if entry is None:
                break
            blocks.append(entry)
        image = None
        if keys.image is not None:
            self.statistics.image_queries += 1
            if len(blocks) == len(keys.blocks):
                image = self._touch(keys.image)
            self.statistics.image_hits += image is not None
        rows = len(blocks) * self.cache.config.block_size
        self.statistics.queried_rows += sequence.num_rows
        self.statistics.hit_rows += keys.image_end if image is not None else rows
        return Match(rows, tuple(blocks), image)

    def share(self, sequence: Sequence) -> CachedPrefix:
        """Gives the slot of a sequence the KV blocks of what is cached of its prompt."""
        assert sequence.slot is not None
        match = self.match(sequence)
        for block in match.blocks:
            for stage, ids in enumerate(block.blocks):
                self.cache.share(stage, sequence.slot, ids, self.cache.config.block_size)
        if match.image is None:
            return CachedPrefix(match.num_text_rows)
        num_rows = sequence.image_end - match.num_text_rows
        try:
            self.cache.share(0, sequence.slot, match.image.blocks[0], num_rows)
        except CapacityError:
            return CachedPrefix(match.num_text_rows)  # sharing may take a block more than computing does
        return CachedPrefix(match.num_text_rows, num_rows, match.image.stage_0_rows)

    def rows_to_keep(self, sequence: Sequence, num_cached: int) -> tuple[int, int]:
        """First and last (excluded) of the rows after the cached ones to `insert` as they leave stage 0.

        (0, 0) for a sequence without an image.
        """
        if not sequence.image_starts:
            return 0, 0
        block_size = self.cache.config.block_size
        whole_blocks = sequence.image_starts[0] // block_size * block_size
        return whole_blocks - num_cached, sequence.image_end - num_cached

    def insert(self, sequence: Sequence, stage_0_rows: Tensor | None) -> None:
        """Keeps the beginning of a sequence that has just been prefilled and still holds its slot.

        Args:
            sequence: with its blocks filled.
            stage_0_rows: see `Entry`; None where it has no image, or no boundary follows stage 0.
        """
        assert sequence.slot is not None
        block_size = self.cache.config.block_size
        keys = _Keys.of(sequence, block_size)
        for index, key in enumerate(keys.blocks):
            if key not in self._entries:
                self._add(key, Entry(self.cache.block_groups(sequence.slot, index, index + 1)))
        if keys.image is not None and keys.image not in self._entries:
            last = -(-keys.image_end // block_size)
            blocks = self.cache.block_groups(sequence.slot, len(keys.blocks), last)[:1]
            self._add(keys.image, Entry(blocks, stage_0_rows))

    def clear(self) -> None:
        """Forgets everything."""
        for key in list(self._entries):
            self._remove(key)

    def _add(self, key: Key, entry: Entry) -> None:
        self._entries[key] = entry
        self.cache.hold(entry.blocks)
        self._row_bytes += _row_bytes(entry)
        while self._row_bytes > self._max_row_bytes:
            self._remove(next(key for key, other in self._entries.items() if other.stage_0_rows is not None))
            self.statistics.evictions += 1

    def _touch(self, key: Key) -> Entry | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def _evict(self, num_blocks: int) -> None:
        """Frees so many blocks, or all that have no other user."""
        goal = self.cache.num_unused_blocks + num_blocks
        for key, entry in list(self._entries.items()):
            if self.cache.num_unused_blocks >= goal:
                return
            if self.cache.would_free(entry.blocks):
                self._remove(key)
                self.statistics.evictions += 1

    def _remove(self, key: Key) -> None:
        entry = self._entries.pop(key)
        self._row_bytes -= _row_bytes(entry)
        self.cache.release(entry.blocks)


@dataclass(frozen=True)
class _Keys:
    """Where the entries of one prompt would be."""

    blocks: tuple[Key, ...]
    image: Key | None
    image_end: int = 0
    """Rows of text before the image, and the image's."""

    @classmethod
    def of(cls, sequence: Sequence, block_size: int) -> _Keys:
        prompt = sequence.prompt
        visual, start = prompt.visual, prompt.image_index
        ids = prompt.token_ids
        text = ids if visual is None or start is None else ids[:start]
        # One row at least is computed: its logits choose the first token. So a prompt that ends in its image has none.
        num_blocks = (len(ids) - 1 if visual is None else len(text)) // block_size
        keys = list(_chain(text[i * block_size : (i + 1) * block_size] for i in range(num_blocks)))
        if visual is None or start is None or start == len(ids) - 1:
            return cls(tuple(keys), None)
        rest = text[num_blocks * block_size :]
        before = keys[-1] if keys else b""
        image = hashlib.sha256(b"image" + before + rest.tobytes() + b"|" + visual.key).digest()
        return cls(tuple(keys), image, start + visual.num_visual_tokens)


def _chain(blocks: Iterable[np.ndarray]) -> Iterable[Key]:
    key = b""
    for block in blocks:
        key = hashlib.sha256(b"text" + key + block.tobytes()).digest()
        yield key


def _row_bytes(entry: Entry) -> int:
    return 0 if entry.stage_0_rows is None else entry.stage_0_rows.nbytes
