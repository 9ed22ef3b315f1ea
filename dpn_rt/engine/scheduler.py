"""Continuous batching: which sequences the next step computes.

A step is either a prefill of new sequences or one token for every running one. Prefills come first, so that new
sequences soon decode with the others. Where prefills are cut into parts, prefill and decode steps alternate, so that
running sequences never wait for a whole prompt. When KV blocks run out, the youngest sequence of the last priority is
preempted: it gives its blocks back, and is prefilled again later together with the tokens that it has generated.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dpn_rt.backends.backend import SequenceCache
from dpn_rt.cache.block_allocator import Slots
from dpn_rt.engine.sequence import Sequence
from dpn_rt.model.reduction.reduction import Reduction
from dpn_rt.settings import EngineSettings


@dataclass(frozen=True)
class Batch:
    """What one step computes."""

    kind: Literal["prefill", "decode"]
    sequences: tuple[Sequence, ...]
    slots: Slots
    """`[num_seqs]` slots in the KV cache."""


class Scheduler:
    """Waiting and running sequences, and the KV blocks that they take."""

    def __init__(self, settings: EngineSettings, reduction: Reduction, cache: SequenceCache) -> None:
        self._settings = settings
        self._reduction = reduction
        self._cache = cache
        self._waiting: list[Sequence] = []  # by `Sequence.order`
        self._running: list[Sequence] = []
        self._prefilling: dict[Sequence, int] = {}  # with the blocks that each may need in all
        self._is_decode_due = False
        self._numbers = itertools.count()
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks: new ones, and preempted ones."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with blocks: in prefill or decoding."""
        return len(self._running) + len(self._prefilling)

    @property
    def num_decoding(self) -> int:
        """Sequences whose prefill is done."""
        return len(self._running)

    def check_fits(self, sequence: Sequence) -> None:
        """Refuse a sequence that could not finish even if it had the whole cache.

        Raises:
            CapacityError: it needs more blocks than there are, or is longer than a sequence may be.
        """
        lengths = self._reduction.most_rows(sequence.num_rows, sequence.segments, sequence.choices)
        # The last token has no row: no token follows that would need it.
        self._cache.check_fits(tuple(length + sequence.max_tokens - 1 for length in lengths), sequence.max_tokens)

    def add(self, sequence: Sequence, siblings: Iterable[Sequence] = ()) -> None:
        """Queues a sequence after all others of its priority.

        Its siblings get their numbers now and are queued or started by `fork`, after its prefill.
        """
        for each in (sequence, *siblings):
            each.number = next(self._numbers)
        self._enqueue(sequence)

    def fork(self, sequence: Sequence, sibling: Sequence) -> bool:
        """Starts a sibling with the rows of a sequence whose prefill has just ended.

        Returns:
            False where there is no room: the sibling waits for a prefill of its own.
        """
        assert sequence.slot is not None
        if self.num_running < self._settings.max_num_seqs:
            free = self._cache.num_free_blocks - self._num_promised_blocks()
            sibling.slot = self._cache.fork(sequence.slot, free)
        if sibling.slot is None:
            self._enqueue(sibling)
            return False
        self._running.append(sibling)
        return True

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence, whatever its state, and frees its blocks."""
        if sequence.slot is not None:
            self._release(sequence)
            if self._prefilling.pop(sequence, None) is None:
                self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def schedule(self) -> Batch | None:
        """The next step; None when nothing is left to do.

        The sequences of a decode step already have room for their new rows. A prefill that has begun is returned again
        and again until `end_prefill`, in turns with decode steps where prefills are cut into parts.
        """
        if not self._prefilling:
            self._prefilling = self._admit()
            self._is_decode_due = False
        if self._is_decode_due:
            decoding = self._make_room()
            if decoding:
                self._is_decode_due = False
                return self._batch("decode", decoding)
        if self._prefilling:
            self._is_decode_due = self._settings.max_chunk_tokens is not None
            return self._batch("prefill", list(self._prefilling))
        decoding = self._make_room()
        return self._batch("decode", decoding) if decoding else None

    def schedule_ahead(self) -> Batch | None:
        """A decode step after one whose tokens are not known yet, of the sequences that may go on.

        None where a prefill or a preemption comes first, or no sequence may go on.
        """
        is_full = len(self._running) >= self._settings.max_num_seqs
        if self._prefilling or (self._waiting and not is_full):
            return None
        sequences = [sequence for sequence in self._running if not sequence.ends_with_next]
        slots = self._slots(sequences)
        if not sequences or self._cache.blocks_to_grow(slots) > self._cache.num_free_blocks:
            return None
        self._cache.grow(slots)
        return self._batch("decode", sequences)

    def end_prefill(self) -> None:
        """From now on, the sequences of the prefill decode."""
        self._running += self._prefilling
        self._prefilling = {}

    def _admit(self) -> dict[Sequence, int]:
        """Takes from the queue what one prefill may hold: sequences, and the blocks that each may need in all."""
        admitted: dict[Sequence, int] = {}
        rows = 0
        slots = self._slots(self._running)
        free = self._cache.num_free_blocks - self._cache.blocks_to_grow(slots)
        while self._waiting and len(self._running) + len(admitted) < self._settings.max_num_seqs:
            sequence = self._waiting[0]
            rows += sequence.num_rows
            lengths = self._reduction.most_rows(sequence.num_rows, sequence.segments, sequence.choices)
            # With room for one new row, else the sequence could be preempted before its first decode step.
            blocks = self._cache.blocks_for(tuple(length + 1 for length in lengths))
            is_alone = not self._running and not admitted  # then it fits: `check_fits` has counted its rows
            if (admitted and rows > self._settings.max_num_batched_tokens) or (blocks > free and not is_alone):
                break
            free -= blocks
            del self._waiting[0]
            sequence.slot = self._cache.open_slot()
            admitted[sequence] = blocks
        return admitted

    def _make_room(self) -> list[Sequence]:
        """The running sequences, each with room for a new row; preempts until there is enough for all of them."""
        free = self._cache.num_free_blocks - self._num_promised_blocks()
        while self._running and self._cache.blocks_to_grow(self._slots(self._running)) > free:
            before = self._cache.num_free_blocks
            self._preempt(max(self._running, key=lambda sequence: sequence.order))
            free += self._cache.num_free_blocks - before
        self._cache.grow(self._slots(self._running))
        return self._running

    def _num_promised_blocks(self) -> int:
        """Blocks that the prefill in progress may still need."""
        return sum(
            max(0, blocks - self._cache.blocks_of(sequence.slot))
            for sequence, blocks in self._prefilling.items()
            if sequence.slot is not None
        )

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        bisect.insort(self._waiting, sequence, key=lambda other: other.order)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self._cache.close_slot(sequence.slot)
        sequence.slot = None

    def _batch(self, kind: Literal["prefill", "decode"], sequences: list[Sequence]) -> Batch:
        return Batch(kind, tuple(sequences), self._slots(sequences))

    @staticmethod
    def _slots(sequences: list[Sequence]) -> Slots:
        return np.asarray([sequence.slot for sequence in sequences], dtype=np.intp)
