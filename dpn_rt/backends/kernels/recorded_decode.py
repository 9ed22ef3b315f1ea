"""Decode steps on the host whose kernels are recorded once for each small number of sequences, and then repeated."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt.backends.backend import Decoded
from dpn_rt.backends.kernels.decode_step import PlainDecodeStep
from dpn_rt.backends.kernels.local_executor import LocalExecutor
from dpn_rt.cache.block_allocator import BlockAllocator, Slots
from dpn_rt.device.device import Device
from dpn_rt.device.host_graph import HostGraph, NotRecordableError, StepMemory
from dpn_rt.sampling.filters import best_ids

MOST_RECORDED_ROWS = 16
"""Above, what lies between kernels is a small part of a step, and the results of all sizes take much memory."""


class RecordedDecodeSteps:
    """The `DecodeStep` of a host. Steps that cannot be recorded, and larger ones, call kernel after kernel."""

    def __init__(self, executor: LocalExecutor, cache: BlockAllocator, device: Device) -> None:
        self._executor, self._cache = executor, cache
        self._plain = PlainDecodeStep(executor, cache, device)
        self._memory = StepMemory()
        self._steps: dict[int, RecordedDecodeStep] = {}
        self._not_recordable: set[int] = set()

    def run(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """See `Backend.decode`. The first step of each size records it."""
        size = len(slots)
        if size > MOST_RECORDED_ROWS or size in self._not_recordable:
            return self._plain.run(token_ids, slots)
        if size not in self._steps:
            self._steps[size] = RecordedDecodeStep(self._executor, self._cache, self._memory, size)
        try:
            return self._steps[size].run(token_ids, slots)
        except NotRecordableError:  # before anything was changed that the same step does not write again
            self._not_recordable.add(size)
            del self._steps[size]
            return self._plain.run(token_ids, slots)


class RecordedDecodeStep:
    """The decode step of `size` rows."""

    def __init__(self, executor: LocalExecutor, cache: BlockAllocator, memory: StepMemory, size: int) -> None:
        self._executor, self._cache, self._memory = executor, cache, memory
        decoder, num_stages = executor.decoder, len(executor.decoder.stages)
        self._x = torch.empty_like(decoder.embed(torch.zeros(size, dtype=torch.int64, device="cpu")))
        self._positions, self._cache_rows, self._kv_lengths = (
            torch.empty(num_stages, size, dtype=torch.int32, device="cpu") for _ in range(3)
        )
        slots = np.zeros(size, dtype=np.intp)
        self._tables = [torch.from_numpy(cache.block_tables(i, slots, whole=True)) for i in range(num_stages)]
        self._cu_seqlens = torch.arange(size + 1, dtype=torch.int32, device="cpu")
        self._graph: HostGraph | None = None

    def run(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """See `Backend.decode`; for exactly `size` sequences.

        Raises:
            NotRecordableError: see `HostGraph`. The step has not been computed.
        """
        self._set(token_ids, slots)
        if self._graph is None:
            self._graph = HostGraph(self._step, self._memory)
        else:
            self._graph.replay()
        return Decoded(*self._graph.outputs)

    def _set(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> None:
        ids = token_ids if isinstance(token_ids, Tensor) else torch.from_numpy(token_ids)
        self._x.copy_(self._executor.decoder.embed(ids.clamp_min(0)))
        kv_lengths = self._cache.kv_lengths(slots).T
        self._kv_lengths.numpy()[:] = kv_lengths
        np.subtract(kv_lengths, 1, out=self._cache_rows.numpy())
        np.subtract(self._cache.next_positions(slots).T, 1, out=self._positions.numpy())
        for stage, table in enumerate(self._tables):
            used = self._cache.block_tables(stage, slots)
            table.numpy()[:, :, : used.shape[2]] = used

    def _step(self) -> tuple[Tensor, Tensor]:
        pool = self._executor.pool
        logits = self._executor.decoder.decode(
            self._x,
            self._positions,
            self._cache_rows,
            self._kv_lengths,
            self._tables,
            self._cu_seqlens,
            pool.blocks,
            pool.positions,
        )
        return logits, best_ids(logits)
