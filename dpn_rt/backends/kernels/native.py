"""The product's own kernels on the CPU: packed rows, paged keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt.backends.backend import Decoded, NewSequences
from dpn_rt.backends.kernels.prefill import Prefill
from dpn_rt.cache.block_allocator import BlockAllocator, Slots
from dpn_rt.cache.kv_pool import KvPool
from dpn_rt.device.device import Device
from dpn_rt.model.decoder import Decoder
from dpn_rt.model.reduction.pooling import Boundary


class NativeBackend:
    """A `Backend`: the decoder's stages, the boundaries between them, and the pool of KV blocks that they fill."""

    def __init__(self, decoder: Decoder, boundaries: Sequence[Boundary], cache: BlockAllocator, pool: KvPool) -> None:
        self._decoder, self._boundaries = decoder, boundaries
        self.cache, self._pool = cache, pool
        self.queue: Device | None = None

    def embed(self, row_ids: npt.NDArray[np.int64], image_rows: Sequence[Tensor]) -> Tensor:
        """`[num_rows, hidden_size]` before the first stage."""
        visual = torch.from_numpy(np.flatnonzero(row_ids < 0))
        return self._decoder.embed_rows(torch.from_numpy(np.maximum(row_ids, 0)), visual, image_rows)

    def prefill(self, sequences: NewSequences) -> Prefill:
        """New sequences before the first stage."""
        return Prefill(self._decoder, self._boundaries, self.cache, self._pool, sequences)

    def decode(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """Logits behind one new row for each sequence, whose room has been made."""
        assert isinstance(token_ids, np.ndarray), "nothing is queued ahead"
        lengths = torch.from_numpy(np.ascontiguousarray(self.cache.kv_lengths(slots).T))
        tables = [torch.from_numpy(self.cache.block_tables(stage, slots)) for stage in range(len(self._decoder.stages))]
        cu_seqlens = torch.arange(len(slots) + 1, dtype=torch.int32)
        ids = torch.from_numpy(token_ids)
        return Decoded(self._decoder.decode(ids, lengths, tables, cu_seqlens, self._pool.blocks))
