"""The backend of the product's own kernels, on the host or on a GPU, with packed rows and a paged KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpn_rt.backends.backend import Decoded, StageRun
from dpn_rt.backends.kernels.executor import Executor
from dpn_rt.backends.kernels.scores import KernelScores
from dpn_rt.backends.kernels.stages import Stages
from dpn_rt.cache.block_allocator import BlockAllocator, Slots
from dpn_rt.device.device import Device
from dpn_rt.model.layout import Chunk, IntArray
from dpn_rt.model.reduction.reducer import AttentionScores, DeviceInputs, Reduced, Reducer
from dpn_rt.model.rows import place_rows
from dpn_rt.model.stage_batch import StageBatch


class DecodeStep(Protocol):
    """Computes one new row per sequence: `decode_graphs.py` on a GPU, `host_decode_graphs.py`, `decode_step.py`."""

    def run(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """See `Backend.decode`."""


class KernelBackend:
    """A `Backend`: the decoder's stages, the reducers between them, and the KV pool, on one device."""

    def __init__(
        self,
        executor: Executor,
        reducers: Sequence[Reducer],
        cache: BlockAllocator,
        stages: Stages,
        step: DecodeStep,
        device: Device,
    ) -> None:
        self.reducers, self.cache = reducers, cache
        self.preparer = KernelStagePreparer(executor, stages, reducers, cache, device)
        self.async_device = device if device.is_async else None
        self.stage_sizes = [stage.num_layers for stage in executor.decoder.stages]
        self.logits, self.close = executor.logits, executor.close
        self.decode = step.run
        self.executor, self.stages, self._step, self._device = executor, stages, step, device

    def embed(self, row_ids: npt.NDArray[np.int64], image_rows: Sequence[Tensor]) -> Tensor:
        """See `Backend.embed`."""
        token_ids, visual = self._device.upload(np.maximum(row_ids, 0), np.flatnonzero(row_ids < 0))
        return place_rows(self.executor.embed(token_ids), visual, image_rows)

    def run(self, stage: int, x: Tensor, keys: Tensor | None, chunk: Chunk, slots: Slots) -> StageRun:
        """See `Backend.run`."""
        cu_seqlens, positions, cache_rows, context_lens, block_tables, last_rows, *last_seqs = self._device.upload(
            chunk.cu_seqlens,
            chunk.positions,
            chunk.cache_rows,
            chunk.context_lens,
            self.cache.block_tables(stage, slots),
            chunk.last_rows,
            *([] if chunk.all_end else [chunk.ends]),
        )
        batch = StageBatch(
            cu_seqlens=cu_seqlens,
            positions=positions,
            cache_rows=cache_rows,
            context_lens=context_lens,
            block_tables=block_tables,
            last_rows=last_rows,
            last_seqs=last_seqs[0] if last_seqs else None,
            queries_out=self.preparer.queries_out(stage, len(chunk.last_rows), x),
            keys=keys,
            extends=chunk.extends,
        )
        return StageRun(self.stages.run(stage, x, batch), batch.queries_out)

    def scores(self, stage: int, queries: Tensor | None, slots: Slots) -> AttentionScores:
        """What reducers may ask for at the end of a stage."""
        return KernelScores(self.executor, stage, queries, self.cache, slots, self._device)


class KernelStagePreparer:
    """A `StagePreparer`. The device makes the metadata, and KV blocks are taken for the most rows that may come."""

    def __init__(
        self,
        executor: Executor,
        stages: Stages,
        reducers: Sequence[Reducer],
        cache: BlockAllocator,
        device: Device,
    ) -> None:
        self._executor, self._stages, self._cache, self._device = executor, stages, cache, device
        self._stages_with_queries = stages_with_queries(reducers)

    def queries_out(self, stage: int, num_ends: int, x: Tensor) -> Tensor | None:
        """Memory for `StageBatch.queries_out`; None where no reducer after the stage reads queries."""
        if stage not in self._stages_with_queries:
            return None
        return x.new_empty(num_ends, *self._executor.decoder.query_shape)

    def prepare(
        self, stage: int, reduced: Reduced, most_rows: IntArray, slots: Slots, forced: IntArray
    ) -> PreparedKernelStage | None:
        """See `StagePreparer`. Takes unused KV blocks only: it evicts no cached prefix for rows that may not come."""
        if not self._cache.has_unused_for(stage, slots, most_rows):
            return None
        self._cache.fill_stage(stage, slots, most_rows)
        layout = reduced.device_layout
        block_tables, device_forced = self._device.upload(self._cache.block_tables(stage, slots), forced)
        ends = layout.cu_seqlens[1:]
        batch = StageBatch(
            cu_seqlens=layout.cu_seqlens,
            positions=layout.positions,
            cache_rows=layout.cache_rows,
            context_lens=ends - layout.cu_seqlens[:-1] + layout.first_cache_rows,
            block_tables=block_tables,
            last_rows=ends.long() - 1,
            queries_out=self.queries_out(stage, len(slots), reduced.rows),
            keys=reduced.next_keys,
            extends=reduced.has_cached_rows,
        )
        self._stages.place(stage, batch)
        inputs = DeviceInputs(layout, device_forced)
        return PreparedKernelStage(stage, batch, slots, inputs, self._stages, self._cache)


def stages_with_queries(reducers: Sequence[Reducer]) -> set[int]:
    """Stages after which a reducer reads `StageBatch.queries_out`."""
    return {stage for stage, reducer in enumerate(reducers) if reducer.reads_queries}


@dataclass(frozen=True, eq=False)
class PreparedKernelStage:
    """A `PreparedStage`, whose positions, cache rows and KV blocks are enough for any number of rows that may come."""

    stage: int
    batch: StageBatch
    slots: Slots
    device_inputs: DeviceInputs
    stages: Stages
    cache: BlockAllocator

    def run(self, rows: Tensor) -> StageRun:
        """See `PreparedStage.run`."""
        count = rows.shape[0]
        batch = replace(self.batch, positions=self.batch.positions[:count], cache_rows=self.batch.cache_rows[:count])
        return StageRun(self.stages.run(self.stage, rows, batch), batch.queries_out)

    def trim(self, kv_lengths: IntArray, next_positions: IntArray) -> None:
        """See `PreparedStage.trim`."""
        self.cache.trim_stage(self.stage, self.slots, kv_lengths, next_positions)
