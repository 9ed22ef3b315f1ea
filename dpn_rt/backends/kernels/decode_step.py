"""A decode step on the host, which calls its kernels one after another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt.backends.backend import Decoded
from dpn_rt.cache.block_allocator import BlockAllocator, Slots
from dpn_rt.cache.kv_pool import KvPool
from dpn_rt.model.decoder import Decoder


class HostDecodeStep:
    """The `DecodeStep` of the host."""

    def __init__(self, decoder: Decoder, cache: BlockAllocator, pool: KvPool) -> None:
        self._decoder, self._cache, self._pool = decoder, cache, pool

    def run(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """See `Backend.decode`."""
        ids = token_ids if isinstance(token_ids, Tensor) else torch.from_numpy(token_ids)
        kv_lengths = torch.from_numpy(np.ascontiguousarray(self._cache.kv_lengths(slots).T))
        positions = torch.from_numpy(np.ascontiguousarray(self._cache.next_positions(slots).T)) - 1
        stages = range(len(self._decoder.stages))
        tables = [torch.from_numpy(self._cache.block_tables(stage, slots)) for stage in stages]
        cu_seqlens = torch.arange(len(slots) + 1, dtype=torch.int32)
        pool = self._pool.blocks, self._pool.positions
        return Decoded(self._decoder.decode(ids, positions, kv_lengths, tables, cu_seqlens, *pool))
