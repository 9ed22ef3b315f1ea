"""New sequences on their way through stages and boundaries, some rows at a time.

A stage is computed in chunks of as many rows as the caller likes, so that others can decode in between; what a chunk
needs of the rows before it is in the cache. Rows of a stage leave for the boundary together.

What the next stage needs is prepared while the boundary before it is under way: its metadata is made on the device, and
KV blocks are taken for as many rows as there may be. When the host is told how many there are, they can be queued
at once; it makes its own layout, and gives back blocks, after that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dpn_rt.backends.backend import NewSequences
from dpn_rt.cache.block_allocator import BlockAllocator
from dpn_rt.cache.kv_pool import KvPool
from dpn_rt.device.device import Device
from dpn_rt.device.host import HostDevice
from dpn_rt.model.decoder import Decoder, StageBatch
from dpn_rt.model.layout import IntArray, Layout
from dpn_rt.model.reduction.pooling import Boundary, BoundaryTrace, Placed, QueuedBoundary, untouched


class Prefill:
    """One batch of new sequences. `advance` until `is_done`; then `logits`, `layouts` and `traces` are there."""

    def __init__(
        self,
        decoder: Decoder,
        boundaries: Sequence[Boundary],
        cache: BlockAllocator,
        pool: KvPool,
        sequences: NewSequences,
        device: Device | None = None,
    ) -> None:
        """
        Args:
            decoder: with its stages.
            boundaries: between them.
            cache: whose KV blocks hold what.
            pool: where keys and values go.
            sequences: the batch.
            device: of all tensors; None: the host.
        """
        self._device = device or HostDevice()
        self._decoder, self._boundaries, self._cache, self._pool = decoder, boundaries, cache, pool
        layout = sequences.layout
        self._x, self._slots = sequences.x, sequences.slots
        self._forced, self._biases = sequences.forced_experts, sequences.router_biases
        self._beginnings, self._kept_rows = list(sequences.beginnings), list(sequences.kept_rows)
        skipped = np.array([beginning.num_exit_rows for beginning in self._beginnings], dtype=np.int32)
        self._computed = layout.behind(skipped)  # of `x`
        self._stage = 0
        self._row = 0  # the first of the stage that has not been computed
        self._has_room = False  # for the stage's rows, in the cache
        self._ended: list[Tensor] = []  # last rows from the last stage
        self._queued: QueuedBoundary | None = None  # before the stage, while its layout is not known here
        self._prepared: StageBatch | None = None  # all rows of that stage, with positions and KV blocks for more
        self._placed: Placed | None = None  # the stage's layout and forced experts on the device
        self.layouts = [layout]
        """Of each stage so far."""
        self.traces: list[BoundaryTrace] = []
        """Of each boundary so far."""
        self.exit_rows: list[Tensor | None] = [None] * layout.num_seqs
        """Per sequence `[kept, hidden_size]`, behind stage 0; None where none were asked for."""
        self.logits: Tensor | None = None
        """`[num_seqs, vocab_size]`, when done."""

    @property
    def is_done(self) -> bool:
        return self.logits is not None

    @property
    def layers(self) -> int:
        """Of the stage that the next chunk goes through."""
        return self._decoder.stages[self._stage].num_layers

    @property
    def _is_last_stage(self) -> bool:
        return self._stage == len(self._decoder.stages) - 1

    def advance(self, max_rows: int | None = None) -> None:
        """The next rows through their stage, and the boundary behind it when they were the last.

        Args:
            max_rows: at most; None: all of the stage.
        """
        if self._queued is not None and self._advance_prepared(self._queued, max_rows):
            return
        layout, stage = self._computed, self._decoder.stages[self._stage]
        num_rows = int(layout.cu_seqlens[-1])
        if not self._has_room:
            self._cache.fill_stage(self._stage, self._slots, layout.kv_lengths)
            self._has_room = True
        end = num_rows if max_rows is None else min(num_rows, self._row + max(1, max_rows))
        if self._row < end:  # else the sequence that the stage waited for was dropped
            rows = stage.forward(self._x[self._row : end], self._chunk(layout, self._row, end), self._pool.blocks)
            self._row = end
            if self._is_last_stage:
                self._ended.append(rows)
        if end == num_rows:
            self._end_stage()

    def drop(self, index: int) -> None:
        """Goes on without one sequence, whose KV blocks may be given to others now."""
        if self._queued is not None:
            self._settle(self._queued)
        self._placed = None
        start, end = map(int, self._computed.cu_seqlens[index : index + 2])
        if self._is_last_stage and end <= self._row:
            ended = torch.cat(self._ended)
            self._ended = [torch.cat((ended[:index], ended[index + 1 :]))]
        self._x = torch.cat((self._x[:start], self._x[end:]))
        self._row -= min(max(self._row - start, 0), end - start)
        kept = np.delete(np.arange(self._computed.num_seqs), index)
        self._slots, self._forced, self._biases = self._slots[kept], self._forced[kept], self._biases[kept]
        for each in (self._beginnings, self._kept_rows, self.exit_rows):
            del each[index]
        self._computed = self._computed.select(kept)
        self.layouts = [each.select(kept) for each in self.layouts]
        self.traces = [each.select(kept) for each in self.traces]

    def _chunk(self, layout: Layout, start: int, end: int) -> StageBatch:
        """Rows `start` to `end` of the packed ones."""
        first, last = (int(np.searchsorted(layout.cu_seqlens, row, side="right")) - 1 for row in (start, end - 1))
        chosen = slice(first, last + 1)
        offsets = np.clip(layout.cu_seqlens[first : last + 2], start, end)
        ends = np.flatnonzero(layout.cu_seqlens[first + 1 : last + 2] <= end)
        positions = layout.positions[start:end]
        context = positions[offsets[1:] - start - 1] + 1
        is_part = len(ends) < last + 1 - first
        cu_seqlens, placed_positions, context_lens, block_tables, last_rows, *last_seqs = self._device.upload(
            offsets - np.int32(start),
            positions,
            context,
            self._cache.block_tables(self._stage, self._slots[chosen]),
            layout.last_rows[first + ends] - start,
            *([ends] if is_part else []),
        )
        return StageBatch(
            cu_seqlens=cu_seqlens,
            positions=placed_positions,
            context_lens=context_lens,
            block_tables=block_tables,
            last_rows=last_rows,
            last_seqs=last_seqs[0] if is_part else None,
            extends=bool((positions[offsets[:-1] - start] > 0).any()),
        )

    def _advance_prepared(self, queued: QueuedBoundary, max_rows: int | None) -> bool:
        """The stage behind a boundary that is under way, if it was prepared and all its rows may go at once."""
        batch, num_rows = self._prepared, queued.num_rows
        if batch is None or (max_rows is not None and num_rows > max_rows):
            self._settle(queued)
            return False
        batch = replace(batch, positions=batch.positions[:num_rows])
        rows = self._decoder.stages[self._stage].forward(self._x[:num_rows], batch, self._pool.blocks)
        self._settle(queued)
        self._row = num_rows
        if self._is_last_stage:
            self._ended.append(rows)
        self._end_stage()
        return True

    def _settle(self, queued: QueuedBoundary) -> None:
        """Takes up what a boundary did; the KV blocks that a prepared stage has too many of are given back."""
        self._x = self._x[: queued.num_rows]
        self._computed, trace = queued.finish()
        self.layouts.append(self._computed)
        self.traces.append(trace)
        self._cache.trim_stage(self._stage, self._slots, self._computed.kv_lengths)
        self._queued = self._prepared = None

    def _prepare(self, queued: QueuedBoundary, longest: IntArray) -> None:
        """What the stage behind a boundary needs, but for the number of its rows.

        Args:
            queued: the boundary.
            longest: `[num_seqs]` rows of each sequence that attention sees there at most.
        """
        stage = self._stage
        if not self._cache.has_unused_for(stage, self._slots, longest):
            return  # blocks that are held for prompts to come are not given up for rows that may never be
        self._cache.fill_stage(stage, self._slots, longest)
        self._has_room = True
        layout = queued.layout
        forced = self._forced[:, stage : stage + 1].ravel()  # nothing behind the last boundary
        block_tables, placed_forced = self._device.upload(self._cache.block_tables(stage, self._slots), forced)
        ends = layout.cu_seqlens[1:]
        self._prepared = StageBatch(
            cu_seqlens=layout.cu_seqlens,
            positions=layout.positions,
            context_lens=ends - layout.cu_seqlens[:-1] + layout.first_cache_rows,
            block_tables=block_tables,
            last_rows=ends.long() - 1,
            extends=bool(self._computed.first_rows.any()),
        )
        self._placed = Placed(layout, placed_forced)

    def _end_stage(self) -> None:
        if self._stage == 0:
            self._take_up_exit_rows()
        if self._is_last_stage:
            self.logits = self._decoder.logits(torch.cat(self._ended))
            self._x = self.logits.new_empty(0)
            return
        layout, boundary, forced = self.layouts[-1], self._boundaries[self._stage], self._forced[:, self._stage]
        behind = boundary.queue(self._x, layout, forced, self._biases, self._placed)
        self._computed, self._placed = layout, None
        self._stage += 1
        self._row = 0
        self._has_room = False
        if behind is None:
            self.layouts.append(layout)
            self.traces.append(untouched(layout))
            return
        self._x, self._queued = behind  # the rows of the stage that has ended are let go
        self._prepare(self._queued, boundary.longest(layout, forced))

    def _take_up_exit_rows(self) -> None:
        """From here on the rows that stage 0 found in the cache are computed like the others."""
        if self._is_last_stage:
            return
        parts = list(torch.split(self._x, self._computed.lengths.tolist()))
        if any(beginning.num_exit_rows for beginning in self._beginnings):
            for index, beginning in enumerate(self._beginnings):
                if beginning.exit_rows is not None:
                    parts[index] = torch.cat((beginning.exit_rows, parts[index]))
            self._x = torch.cat(parts)
        for index, (part, kept) in enumerate(zip(parts, self._kept_rows, strict=True)):
            self.exit_rows[index] = part[slice(*kept)].clone() if kept[1] else None
