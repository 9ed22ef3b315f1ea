"""Converts packed rows to padded ones and back, and groups sequences by slots for the calls of a plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpn_rt.cache.block_allocator import Slots
from dpn_rt.device.device import Device
from dpn_rt.model.layout import IntArray

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Padding:
    """Index tensors that pad some sequences of a packed batch to the longest of them, and undo that."""

    num_seqs: int
    longest: int
    packed: Tensor
    """`[num_rows]` int64 indices of the sequences' rows in the packed batch."""
    padded: Tensor
    """`[num_rows]` int64 indices of these rows in the padded batch `[num_seqs * longest]`."""

    @classmethod
    def of(cls, cu_seqlens: IntArray, chosen: Indices, device: Device) -> Padding:
        """
        Args:
            cu_seqlens: `[batch size + 1]` int32 offsets of the packed batch.
            chosen: indices of at least one sequence, in the order of the padded batch.
            device: of the rows.
        """
        lengths = np.diff(cu_seqlens)[chosen].astype(np.int64)
        longest = int(lengths.max())
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        packed, padded = device.upload(
            np.repeat(cu_seqlens[chosen].astype(np.int64), lengths) + within,
            np.repeat(np.arange(len(chosen)) * longest, lengths) + within,
        )
        return cls(len(chosen), longest, packed, padded)

    def pad(self, x: Tensor) -> Tensor:
        """Packed `[batch rows, hidden_size]` -> `[num_seqs, longest, hidden_size]`, with zeros after each sequence."""
        rows = x.new_zeros(self.num_seqs * self.longest, x.shape[1])
        rows.index_copy_(0, self.padded, x.index_select(0, self.packed))
        return rows.view(self.num_seqs, self.longest, x.shape[1])

    def unpad(self, rows: Tensor, out: Tensor) -> None:
        """Copies padded rows `[num_seqs, longest, hidden_size]` to their rows of `out` `[batch rows, hidden_size]`."""
        out.index_copy_(0, self.packed, rows.flatten(0, 1).index_select(0, self.padded))


def neighbours(slots: Slots, most: int) -> list[Indices]:
    """Groups of sequences with consecutive slots, at most `most` in each.

    A call of a plan reads the caches of a range of slots, one per sequence. So the sequences of one call must have
    consecutive slots.

    Args:
        slots: `[num_seqs]`, all different.
        most: largest size of a group, at least 1.

    Returns:
        Per group the indices into `slots`, in ascending order of slots.
    """
    order = np.argsort(slots)
    runs = np.split(order, np.flatnonzero(np.diff(slots[order]) != 1) + 1)
    return [run[first : first + most] for run in runs for first in range(0, len(run), most)]
