"""Packed rows to padded ones, and the order in which sequences of a batch go through a plan."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpn_rt.cache.block_allocator import Slots
from dpn_rt.device.device import Device
from dpn_rt.model.layout import Layout

Indices = npt.NDArray[np.intp]


def pad(x: Tensor, layout: Layout, chosen: Indices, device: Device) -> Tensor:
    """Some sequences of a packed batch `[num_rows, hidden_size]` -> `[num_chosen, longest, hidden_size]`.

    Zeros behind each sequence.

    Args:
        x: on `device`.
        layout: of `x`.
        chosen: the sequences, in the order in which they are wanted; at least one.
        device: of both.
    """
    lengths = layout.lengths[chosen].astype(np.int64)
    longest = int(lengths.max())
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    source, target = device.upload(
        np.repeat(layout.cu_seqlens[chosen].astype(np.int64), lengths) + within,
        np.repeat(np.arange(len(chosen)) * longest, lengths) + within,
    )
    padded = x.new_zeros(len(chosen) * longest, x.shape[1]).index_copy_(0, target, x.index_select(0, source))
    return padded.view(len(chosen), longest, x.shape[1])


def neighbours(slots: Slots, most: int) -> list[Indices]:
    """Sequences in groups of at most `most` whose slots follow one another.

    A plan takes a cache of as many slots as it takes sequences, so only neighbours can go through it together.

    Args:
        slots: `[num_seqs]`, all different.
        most: at least 1.

    Returns:
        Per group the indices into `slots`, by rising slot.
    """
    order = np.argsort(slots)
    runs = np.split(order, np.flatnonzero(np.diff(slots[order]) != 1) + 1)
    return [run[first : first + most] for run in runs for first in range(0, len(run), most)]
