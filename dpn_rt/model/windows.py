"""Sliding windows: which cache row is the first that a row sees.

A row at position p sees the rows at positions p - window + 1 to p, the rule of transformers' `sliding_window`. Where a
boundary left out rows and kept positions, these are the positions of the whole prompt. Positions rise within a
sequence, so the rows of a window are consecutive, and attention needs only the first one. A batch finds it once for all
layers of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dpn_rt.model.layout import IntArray, Layout
from dpn_rt.model.stage_batch import StageBatch

AFTER_ALL = 2**25
"""Above every position (`schema.bounds.Positions`)."""


def first_keys(batch: StageBatch, key_positions: Tensor, windows: Sequence[int]) -> dict[int, Tensor]:
    """Note the positions of a batch's rows, and find where their windows begin.

    Args:
        batch: rows of one stage.
        key_positions: `[num_blocks, block_size]` int32 position of each cached row, in the blocks of a stage's first
            layer group; those of the batch's rows are written.
        windows: of the stage's layers, each once.

    Returns:
        For each window `[num_rows]` int32: the first cache row of its sequence that each row sees.
    """
    table, block_size = batch.block_tables[0].clamp_min(0).long(), key_positions.shape[1]
    num_seqs, width, device = table.shape[0], table.shape[1] * block_size, table.device
    rows = torch.arange(batch.positions.shape[0], dtype=torch.int32, device=device)
    owners = torch.searchsorted(batch.cu_seqlens[1:], rows, right=True)
    cache_rows = batch.cache_rows.long()
    blocks = table[owners, cache_rows // block_size]
    key_positions[blocks, cache_rows % block_size] = batch.positions
    # One rising list of all sequences, so that one search serves all rows.
    is_after = torch.arange(width, dtype=torch.int32, device=device) >= batch.context_lens[:, None]
    known = key_positions[table].flatten(1).masked_fill_(is_after, AFTER_ALL - 1)
    sequences = torch.arange(num_seqs, device=device)
    known_of_all = (known + (sequences * AFTER_ALL)[:, None]).flatten()
    found = {}
    for window in windows:
        wanted = (batch.positions - (window - 1)).clamp_min_(0) + owners * AFTER_ALL
        found[window] = (torch.searchsorted(known_of_all, wanted) - owners * width).int()
    return found


def last_row_first_keys(layout: Layout, window: int) -> IntArray:
    """`[num_seqs]` first cache row that the last row of each sequence sees.

    Cached rows before the computed ones are at the positions of their cache rows.
    """
    found = layout.first_cache_rows.copy()
    for sequence, num_cached in enumerate(layout.first_cache_rows):
        first, end = layout.cu_seqlens[sequence : sequence + 2]
        positions = layout.positions[first:end]
        if len(positions):
            wanted = positions[-1] - (window - 1)
            found[sequence] = np.clip(wanted, 0, num_cached) + np.searchsorted(positions, wanted)
    return found
