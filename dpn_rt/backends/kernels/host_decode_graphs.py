"""Decode steps on the host as graphs, one for each small number of sequences; the first step of a size records it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt.backends.backend import Decoded
from dpn_rt.backends.kernels.decode_step import PlainDecodeStep
from dpn_rt.backends.kernels.executor import DecodeInputs
from dpn_rt.backends.kernels.local_executor import LocalExecutor
from dpn_rt.cache.block_allocator import BlockAllocator, Slots
from dpn_rt.device.device import Device
from dpn_rt.device.host_graph import HostGraph, NotRecordableError
from dpn_rt.device.step_memory import StepMemory
from dpn_rt.sampling.filters import best_ids

MOST_RECORDED_ROWS = 16
"""With more rows, what lies between kernels is a small part of a step."""


class HostDecodeGraphs:
    """The `DecodeStep` of a host. Steps that cannot be recorded, and larger ones, call kernel after kernel."""

    def __init__(self, executor: LocalExecutor, cache: BlockAllocator, device: Device, max_num_seqs: int) -> None:
        self._executor, self._cache = executor, cache
        self._plain = PlainDecodeStep(executor, cache, device)
        self._memory = StepMemory()
        self._most_rows = min(MOST_RECORDED_ROWS, max_num_seqs)
        self._inputs = _Inputs.of(executor, cache, self._most_rows)
        self._graphs: dict[int, HostDecodeGraph] = {}
        self._not_recordable: set[int] = set()

    def run(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """See `Backend.decode`.

        Raises:
            KernelArgumentError: an op refuses the values of a tensor.
        """
        size = len(slots)
        if size > self._most_rows or size in self._not_recordable:
            return self._plain.run(token_ids, slots)
        if size not in self._graphs:
            inputs = self._inputs.first_rows(size)
            self._graphs[size] = HostDecodeGraph(self._executor, self._cache, self._memory, inputs)
        try:
            return self._graphs[size].run(token_ids, slots)
        except NotRecordableError:  # the plain step writes again what was written of the KV cache
            self._not_recordable.add(size)
            del self._graphs[size]
            return self._plain.run(token_ids, slots)


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What a decode step reads besides weights and KV blocks, at fixed addresses."""

    token_ids: Tensor
    """`[num_seqs]` int64."""
    places: DecodeInputs
    """Of contiguous tensors, with block tables for the longest sequences."""

    @classmethod
    def of(cls, executor: LocalExecutor, cache: BlockAllocator, num_seqs: int) -> _Inputs:
        """Of a number of sequences; values but for `cu_seqlens` mean nothing yet."""
        num_stages, no_slots = len(executor.decoder.stages), np.zeros(num_seqs, dtype=np.intp)
        with torch.inference_mode(False):  # tensors that can be written in any mode
            positions, cache_rows, kv_lengths = (
                torch.empty(num_stages, num_seqs, dtype=torch.int32, device="cpu") for _ in range(3)
            )
            places = DecodeInputs(
                positions=positions,
                cache_rows=cache_rows,
                kv_lengths=kv_lengths,
                block_tables=[torch.from_numpy(cache.block_tables(i, no_slots, whole=True)) for i in range(num_stages)],
                cu_seqlens=torch.arange(num_seqs + 1, dtype=torch.int32, device="cpu"),
            )
            return cls(torch.empty(num_seqs, dtype=torch.int64, device="cpu"), places)

    def first_rows(self, num_seqs: int) -> _Inputs:
        """Of fewer sequences, contiguous and in the same memory."""
        places = DecodeInputs(
            positions=_first(self.places.positions, num_seqs),
            cache_rows=_first(self.places.cache_rows, num_seqs),
            kv_lengths=_first(self.places.kv_lengths, num_seqs),
            block_tables=[_first(table, num_seqs) for table in self.places.block_tables],
            cu_seqlens=self.places.cu_seqlens[: num_seqs + 1],
        )
        return _Inputs(self.token_ids[:num_seqs], places)


def _first(tensor: Tensor, num_seqs: int) -> Tensor:
    """`[first, num_seqs, ...]`, contiguous, at the beginning of the memory of `tensor` `[first, more, ...]`."""
    shape = (tensor.shape[0], num_seqs, *tensor.shape[2:])
    return tensor.flatten()[: math.prod(shape)].view(shape)


class HostDecodeGraph:
    """The decode step of the number of sequences that its inputs have."""

    def __init__(self, executor: LocalExecutor, cache: BlockAllocator, memory: StepMemory, inputs: _Inputs) -> None:
        self._executor, self._cache, self._memory, self._inputs = executor, cache, memory, inputs
        self._graph: HostGraph | None = None

    def run(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """See `Backend.decode`; for exactly the number of sequences.

        Raises:
            KernelArgumentError: an op refuses the values of a tensor.
            NotRecordableError: see `HostGraph`; nothing of the step's results is to be used.
        """
        self._set(token_ids, slots)
        if self._graph is None:
            # Not a method: the graph would then hold this object, which holds the graph.
            self._graph = HostGraph(partial(_decode, self._executor, self._inputs), self._memory)
        else:
            self._graph.replay()
        return Decoded(*self._graph.outputs)

    def _set(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> None:
        places = self._inputs.places
        self._inputs.token_ids.numpy()[:] = token_ids.numpy() if isinstance(token_ids, Tensor) else token_ids
        kv_lengths = self._cache.kv_lengths(slots).T
        places.kv_lengths.numpy()[:] = kv_lengths
        np.subtract(kv_lengths, 1, out=places.cache_rows.numpy())
        np.subtract(self._cache.next_positions(slots).T, 1, out=places.positions.numpy())
        for stage, table in enumerate(places.block_tables):
            used = self._cache.block_tables(stage, slots)
            table.numpy()[:, :, : used.shape[2]] = used


def _decode(executor: LocalExecutor, inputs: _Inputs) -> tuple[Tensor, Tensor]:
    """Logits `[num_seqs, vocab_size]`, and the best token of each row `[num_seqs]` int64."""
    logits = executor.decode(inputs.token_ids, inputs.places)
    return logits, best_ids(logits)
