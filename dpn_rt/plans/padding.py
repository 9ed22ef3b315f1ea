"""Packed rows to padded ones and back, and the order in which sequences of a batch go through a plan."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt.cache.kv_cache import Slots
from dpn_rt.model.layout import IntArray

Indices = npt.NDArray[np.intp]


def pad(rows: Tensor, lengths: IntArray) -> Tensor:
    """`[num_rows, hidden_size]` of sequences -> `[num_seqs, longest, hidden_size]`, zeros behind each sequence."""
    width = int(lengths.max())
    padded = rows.new_zeros(len(lengths) * width, rows.shape[1])
    padded.index_copy_(0, _places(lengths, width, rows.device), rows)
    return padded.view(len(lengths), width, rows.shape[1])


def unpad(padded: Tensor, lengths: IntArray) -> Tensor:
    """The inverse of `pad`."""
    return padded.flatten(0, 1).index_select(0, _places(lengths, padded.shape[1], padded.device))


def _places(lengths: IntArray, width: int, device: torch.device) -> Tensor:
    """`[num_rows]` int64 place of each packed row among the padded ones."""
    starts = np.cumsum(lengths) - lengths
    rows = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    return torch.from_numpy(rows + np.repeat(np.arange(len(lengths)) * width, lengths)).to(device)


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
