"""Decode steps as graphs, one per batch size. The host sends one block of metadata and launches one graph per step.

Block tables stay on the device: of them the block has the entries that are new.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpn_rt.backends.backend import Decoded
from dpn_rt.cache.block_allocator import BlockAllocator, Slots
from dpn_rt.cache.device_tables import DeviceTables
from dpn_rt.cache.kv_pool import KvPool
from dpn_rt.device.device import Device, StaticInputs
from dpn_rt.device.packing import Array
from dpn_rt.model.decoder import Decoder
from dpn_rt.sampling.filters import best_ids

PADDING_TOKEN = 0
"""Token of padding rows. Any token works, since their results are not read."""


class DecodeGraphs:
    """Decode steps for batches of every size up to a limit."""

    def __init__(
        self, decoder: Decoder, cache: BlockAllocator, pool: KvPool, device: Device, max_num_seqs: int
    ) -> None:
        """Records a graph for every size. The largest comes first, so that the others fit in its memory."""
        tables = DeviceTables(cache, device)
        self._graphs = {
            size: DecodeGraph(decoder, cache, tables, pool, device, size)
            for size in sorted(batch_sizes(max_num_seqs), reverse=True)
        }

    def run(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """See `Backend.decode`; for at most `max_num_seqs` sequences."""
        size = min(size for size in self._graphs if size >= len(slots))
        return self._graphs[size].run(token_ids, slots)


class DecodeGraph:
    """The decode step of `size` rows. Smaller batches are padded with rows of the cache's padding slot."""

    def __init__(
        self,
        decoder: Decoder,
        cache: BlockAllocator,
        tables: DeviceTables,
        pool: KvPool,
        device: Device,
        size: int,
    ) -> None:
        self._decoder, self._cache, self._tables, self._pool = decoder, cache, tables, pool
        self._size = size
        none = np.empty(0, dtype=np.intp)
        self._inputs = StaticInputs(device, self._metadata(none, none))
        self._cu_seqlens = device.upload(np.arange(size + 1, dtype=np.int32))[0]
        self._graph = device.record(self._step)

    def run(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """See `Backend.decode`; for at most `size` sequences."""
        if isinstance(token_ids, Tensor):
            self._inputs.set(self._metadata(np.full(len(slots), PADDING_TOKEN), slots))
            self._inputs.tensors[0][: len(slots)].copy_(token_ids.clamp_min(0))
        else:
            self._inputs.set(self._metadata(token_ids, slots))
        self._graph.replay()
        logits, best = self._graph.outputs
        return Decoded(logits[: len(slots)], best[: len(slots)])

    def _metadata(self, token_ids: npt.NDArray[np.int64], slots: Slots) -> list[Array]:
        """Inputs of the graph, padded to `size` rows.

        Token ids `[size]`, positions `[num_stages, size]`, KV lengths `[num_stages, size]`, slots `[size]`, and what
        has changed in the block tables: in most steps at most a block group for each row and stage.
        """
        count = self._size - len(slots)
        slots = np.concatenate((slots, np.full(count, self._cache.padding_slot)))
        ids = np.concatenate((token_ids, np.full(count, PADDING_TOKEN))).astype(np.int32)
        positions, kv_lengths = self._cache.next_positions(slots).T - 1, self._cache.kv_lengths(slots).T
        changes = self._tables.take_changes(self._size * self._tables.num_groups)
        return [ids, positions, kv_lengths, slots.astype(np.int64), *changes]

    def _step(self) -> tuple[Tensor, ...]:
        token_ids, positions, kv_lengths, slots, *changes = self._inputs.tensors
        self._tables.apply(*changes)
        pool = self._pool.blocks, self._pool.positions
        x = self._decoder.embed(token_ids)
        tables = self._tables.of_slots(slots)
        logits = self._decoder.decode(x, positions, kv_lengths - 1, kv_lengths, tables, self._cu_seqlens, *pool)
        return logits, best_ids(logits)


def batch_sizes(max_num_seqs: int) -> Iterator[int]:
    """Batch sizes to record: 1, 2, 4, 8, 16, 24, 32, ... below `max_num_seqs`, and `max_num_seqs`."""
    size = 1
    while size < max_num_seqs:
        yield size
        size = size * 2 if size < 16 else size + 8
    yield max_num_seqs
