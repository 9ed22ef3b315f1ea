"""The product's own kernels on a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpn_rt.backends.backend import Decoded, NewSequences
from dpn_rt.backends.kernels.decode_graphs import DecodeGraphs
from dpn_rt.backends.kernels.prefill import Prefill
from dpn_rt.cache.block_allocator import BlockAllocator, Slots
from dpn_rt.cache.kv_pool import KvPool
from dpn_rt.device.device import Device
from dpn_rt.model.decoder import Decoder
from dpn_rt.model.reduction.pooling import Boundary


class DeviceBackend:
    """A `Backend`: prefills queued op after op, decode steps as graphs, all tensors on one device."""

    def __init__(
        self,
        decoder: Decoder,
        boundaries: Sequence[Boundary],
        cache: BlockAllocator,
        pool: KvPool,
        graphs: DecodeGraphs,
        device: Device,
    ) -> None:
        self._decoder, self._boundaries = decoder, boundaries
        self.cache, self._pool = cache, pool
        self._graphs, self._device = graphs, device

    @property
    def queue(self) -> Device:
        """The device: a decode step may be queued before the host knows its tokens."""
        return self._device

    def embed(self, row_ids: npt.NDArray[np.int64], image_rows: Sequence[Tensor]) -> Tensor:
        """`[num_rows, hidden_size]` before the first stage."""
        token_ids, visual = self._device.upload(np.maximum(row_ids, 0), np.flatnonzero(row_ids < 0))
        return self._decoder.embed_rows(token_ids, visual, image_rows)

    def prefill(self, sequences: NewSequences) -> Prefill:
        """New sequences before the first stage."""
        return Prefill(self._decoder, self._boundaries, self.cache, self._pool, sequences, self._device)

    def decode(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """Logits and best ids behind one new row for each sequence, whose room has been made."""
        return self._graphs.run(token_ids, slots)
