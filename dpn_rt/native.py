"""The product's own kernels: packed rows, paged keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dpn_rt.backend import NewSequences
from dpn_rt.decoder import Decoder, decode_batch
from dpn_rt.kv_cache import KvCache, Slots
from dpn_rt.prefill import Prefill
from dpn_rt.pyramid import Boundary


class NativeBackend:
    """A `Backend`: the decoder's stages, the boundaries between them, and the pool of cells that they fill."""

    def __init__(self, decoder: Decoder, boundaries: Sequence[Boundary], cache: KvCache) -> None:
        self._decoder, self._boundaries = decoder, boundaries
        self.cache = cache

    def embed(self, token_ids: Tensor) -> Tensor:
        """`[num_tokens]` -> `[num_tokens, hidden_size]`."""
        return self._decoder.embed(token_ids)

    def prefill(self, sequences: NewSequences) -> Prefill:
        """New sequences before the first stage."""
        return Prefill(
            self._decoder,
            self._boundaries,
            self.cache,
            sequences.x,
            sequences.layout,
            sequences.slots,
            sequences.forced_experts,
            sequences.router_biases,
            sequences.beginnings,
            sequences.kept_rows,
        )

    def decode(self, token_ids: Tensor, slots: Slots) -> Tensor:
        """Logits `[num_seqs, vocab_size]` behind one new row for each sequence, whose room has been made."""
        lengths = torch.from_numpy(np.ascontiguousarray(self.cache.lengths(slots).T))
        cu_seqlens = torch.arange(len(slots) + 1, dtype=torch.int32)
        x = self._decoder.embed(token_ids)
        for index, stage in enumerate(self._decoder.stages):
            batch = decode_batch(lengths[index], self.cache.block_tables(index, slots), cu_seqlens)
            x = stage.forward(x, batch, self.cache.cells)
        return self._decoder.logits(x)
