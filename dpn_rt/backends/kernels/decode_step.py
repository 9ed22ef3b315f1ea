"""A decode step whose kernels are called one after another: what the host cannot record, and ranks of an engine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt.backends.backend import Decoded
from dpn_rt.backends.kernels.executor import DecodeInputs, Executor
from dpn_rt.cache.block_allocator import BlockAllocator, Slots
from dpn_rt.device.device import Device
from dpn_rt.device.packing import Array


class PlainDecodeStep:
    """The `DecodeStep` without graphs."""

    def __init__(self, executor: Executor, cache: BlockAllocator, device: Device) -> None:
        self._executor, self._cache = executor, cache
        self._upload = device.upload if device.is_async else _as_tensors

    def run(self, token_ids: npt.NDArray[np.int64] | Tensor, slots: Slots) -> Decoded:
        """See `Backend.decode`."""
        tables = [self._cache.block_tables(stage, slots) for stage in range(len(self._executor.decoder.stages))]
        kv_lengths, positions, cu_seqlens, *on_device = self._upload(
            np.ascontiguousarray(self._cache.kv_lengths(slots).T),
            np.ascontiguousarray(self._cache.next_positions(slots).T - 1),
            np.arange(len(slots) + 1, dtype=np.int32),
            *tables,
        )
        if isinstance(token_ids, Tensor):
            ids = token_ids.clamp_min(0)  # those of rows whose result is not used
        else:
            (ids,) = self._upload(token_ids)
        inputs = DecodeInputs(positions, kv_lengths - 1, kv_lengths, on_device, cu_seqlens)
        return Decoded(self._executor.decode(ids, inputs))


def _as_tensors(*arrays: Array) -> list[Tensor]:
    """The arrays themselves, where tensors are in the host's memory too."""
    return [torch.from_numpy(array) for array in arrays]
