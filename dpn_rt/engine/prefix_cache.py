"""Keys and values of prompts' prefixes, kept for later prompts that begin with the same tokens and images.

There are two kinds of entries. A block of text rows before the first image is the same in every stage, whatever follows
it. From the first image on, rows are the same in stage 0 alone: beyond the first boundary they depend on the question
that comes last. So the entry of an image has KV blocks of stage 0, and rows as they left that stage, which the boundary
takes as its input when the next question comes. Text between two images belongs to the entry of the second one.

The key of an entry is a hash of everything from the prompt's first row to the entry's last, the image's content
included, so two images never share. When KV blocks run out, the least recently used entries are dropped first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from itertools import takewhile, zip_longest

import numpy as np
from torch import Tensor

from dpn_rt.cache.block_allocator import BlockAllocator, BlockIds
from dpn_rt.engine.sequence import Sequence
from dpn_rt.errors import CapacityError
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID
from dpn_rt.model.reduction.grid import IntArray

Key = bytes


@dataclass(frozen=True, eq=False)
class Entry:
    """One block of text in all stages, or one image in stage 0."""

    blocks: tuple[BlockIds, ...]
    """Per stage `[layer_groups, num_block_groups]`; of an image stage 0 alone, from the block with its first row on."""
    stage_0_rows: Tensor | None = None
    """`[num_rows, hidden_size]` of an image: its rows as they left stage 0; None where no boundary follows."""
    kept: IntArray | None = None
    """See `ImageResult`."""

    @property
    def row_bytes(self) -> int:
        """Memory of `stage_0_rows`."""
        return 0 if self.stage_0_rows is None else self.stage_0_rows.nbytes


@dataclass(frozen=True)
class Match:
    """The entries that a prompt begins with."""

    text: tuple[Entry, ...]
    """Of its first rows, one whole block each."""
    images: tuple[Entry, ...]
    """Of its first images, where all text before them was found."""


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """The rows of a prompt that are in the cache, from its first row on."""

    num_rows: int = 0
    """Rows of text that every stage has."""
    num_images: int = 0
    """The prompt's first images, which stage 0 alone has."""
    num_stage_0_rows: int = 0
    """Rows of these images' entries; they come after `num_rows`."""
    stage_0_rows: tuple[Tensor, ...] = ()
    """Per image `[num_rows, hidden_size]`: these rows as they left stage 0; empty where no boundary follows."""
    kept: tuple[IntArray | None, ...] = ()
    """Per image, see `ImageResult`."""


@dataclass
class PrefixStatistics:
    """Since the start."""

    queried_rows: int = 0
    """Rows of prompts at stage 0."""
    hit_rows: int = 0
    """Of these, rows that were in the cache."""
    image_queries: int = 0
    """Images of prompts, also those that have no entry here."""
    image_hits: int = 0
    evictions: int = 0
    """Entries that gave way to others."""


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
        cached = self._share(sequence, _Keys.of(sequence, self._block_size))
        self.statistics.queried_rows += sequence.num_rows
        self.statistics.hit_rows += cached.num_rows + cached.num_stage_0_rows
        self.statistics.image_queries += len(sequence.prompt.images)
        self.statistics.image_hits += cached.num_images
        return cached

    def _share(self, sequence: Sequence, keys: _Keys) -> CachedPrefix:
        assert sequence.slot is not None
        match = self._match(keys)
        for entry in match.text:
            for stage, blocks in enumerate(entry.blocks):
                self._allocator.share(stage, sequence.slot, blocks, self._block_size)
        text = CachedPrefix(len(match.text) * self._block_size)
        if not match.images:
            return text
        num_images = len(match.images)
        num_rows = keys.images[num_images - 1].end - text.num_rows
        try:
            self._allocator.share(0, sequence.slot, self._joined_blocks(match, keys), num_rows)
        except CapacityError:
            return text  # sharing may take one block group more than computing does
        rows = tuple(entry.stage_0_rows for entry in match.images if entry.stage_0_rows is not None)
        return CachedPrefix(text.num_rows, num_images, num_rows, rows, tuple(entry.kept for entry in match.images))

    def rows_to_keep(self, sequence: Sequence, cached: CachedPrefix) -> list[tuple[int, int]]:
        """Which rows `insert` wants as they leave stage 0.

        Args:
            sequence: in prefill.
            cached: what was found of its prompt.

        Returns:
            First and last (excluded) row of each image that was not found, counted from the first row that was not.
        """
        num_cached = cached.num_rows + cached.num_stage_0_rows
        images = _Keys.of(sequence, self._block_size).images[cached.num_images :]
        return [(image.start - num_cached, image.end - num_cached) for image in images]

    def insert(self, sequence: Sequence, stage_0_rows: ListOf[Tensor], kept: ListOf[IntArray | None] = ()) -> None:
        """Keeps the prefix of a sequence that has just been prefilled and still has its slot.

        Args:
            sequence: with its KV blocks filled.
            stage_0_rows: of each image, see `Entry`; empty where no boundary follows stage 0.
            kept: of each image, see `ImageResult`.
        """
        assert sequence.slot is not None
        keys = _Keys.of(sequence, self._block_size)
        for index, key in enumerate(keys.text):
            if key not in self._entries:
                self._add(key, Entry(self._allocator.block_groups(sequence.slot, index, index + 1)))
        for image, rows, ids in zip_longest(keys.images, stage_0_rows, kept[: len(keys.images)]):
            if image.key not in self._entries:
                first, end = image.start // self._block_size, -(-image.end // self._block_size)
                self._add(image.key, Entry(self._allocator.block_groups(sequence.slot, first, end)[:1], rows, ids))

    def clear(self) -> None:
        """Drops all entries."""
        for key in list(self._entries):
            self._remove(key)

    def _match(self, keys: _Keys) -> Match:
        """The entries of a prompt, which are marked as used now."""
        text = self._find_first(keys.text)
        images: list[Entry] = []
        if len(text) == len(keys.text):
            images = self._find_first([image.key for image in keys.images])
        return Match(tuple(text), tuple(images))

    def _joined_blocks(self, match: Match, keys: _Keys) -> BlockIds:
        """`[layer_groups, num_block_groups]` of stage 0 with the rows of all matching images.

        A block with the end of one image and the start of the next is in both entries. The later entry's is taken: it
        has the rows of both.
        """
        first = len(match.text)
        joined = match.images[0].blocks[0]
        for entry, image in zip(match.images[1:], keys.images[1:], strict=False):
            joined = np.concatenate((joined[:, : image.start // self._block_size - first], entry.blocks[0]), axis=1)
        return joined

    def _find_first(self, keys: Iterable[Key]) -> list[Entry]:
        """The entries of the first keys, up to one that has none."""
        return [entry for entry in takewhile(lambda entry: entry is not None, map(self._find, keys)) if entry]

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
class _ImageKey:
    """Under which key an image's entry is kept, and which rows are in it."""

    key: Key
    start: int
    """The row after the text blocks, or after the image before."""
    end: int
    """The row after the image's last."""


@dataclass(frozen=True)
class _Keys:
    """Under which keys the entries of one prompt are kept."""

    text: tuple[Key, ...]
    """One for each whole block of text before the first image; in a prompt without one, before its last row."""
    images: tuple[_ImageKey, ...]

    @classmethod
    def of(cls, sequence: Sequence, block_size: int) -> _Keys:
        prompt, ids = sequence.prompt, sequence.prompt.token_ids
        # The last row must be computed, since its logits choose the first token: it is never part of an entry. So an
        # image that ends the prompt has no entry.
        num_text_rows = prompt.image_starts[0] if prompt.images else len(ids) - 1
        num_blocks = num_text_rows // block_size
        text = list(_chain(ids[i * block_size : (i + 1) * block_size] for i in range(num_blocks)))
        images: list[_ImageKey] = []
        start, key = num_blocks * block_size, text[-1] if text else b""
        pieces = np.split(ids, np.flatnonzero(ids == IMAGE_PLACEHOLDER_ID))  # each but the first begins with an image
        before = pieces[0][start:]
        for image, first_row, after in zip(prompt.images, prompt.image_starts, pieces[1:], strict=True):
            end = first_row + image.num_rows
            if end == prompt.num_rows:
                break
            key = hashlib.sha256(b"image" + key + before.tobytes() + b"|" + image.key).digest()
            images.append(_ImageKey(key, start, end))
            start, before = end, after[1:]
        return cls(tuple(text), tuple(images))


def _chain(blocks: Iterable[np.ndarray]) -> Iterable[Key]:
    """A key for each block of token ids, which depends on all blocks before it too."""
    key = b""
    for block in blocks:
        key = hashlib.sha256(b"text" + key + block.tobytes()).digest()
        yield key
