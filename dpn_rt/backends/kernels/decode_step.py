"""A decode step whose kernels are called one after another, for the host."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt.backends.backend import Decoded
from dpn_rt.cache.kv_cache import KvCache, Slots
from dpn_rt.model.decoder import Decoder


class HostDecodeStep:
    """A `DecodeStep`."""

    def __init__(self, decoder: Decoder, cache: KvCache) -> None:
        self._decoder, self._cache = decoder, cache

    def run(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """One new row for each sequence, whose room has been made."""
        ids = token_ids if isinstance(token_ids, Tensor) else torch.from_numpy(token_ids)
        lengths = torch.from_numpy(np.ascontiguousarray(self._cache.lengths(slots).T))
        stages = range(len(self._decoder.stages))
        tables = [torch.from_numpy(self._cache.block_tables(stage, slots)) for stage in stages]
        cu_seqlens = torch.arange(len(slots) + 1, dtype=torch.int32)
        return Decoded(self._decoder.decode(ids, lengths, tables, cu_seqlens, self._cache.cells))
