"""Token ids and images' rows -> the rows that enter the first stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def place_rows(x: Tensor, given: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Put other rows in some places of embeddings.

    Args:
        x: `[num_rows, hidden_size]` embeddings, of any token where a row is given; may be overwritten.
        given: `[num_given]` int64, which rows are.
        rows: their `[..., hidden_size]` parts in order, of any dtype and device.

    Returns:
        `[num_rows, hidden_size]`, dtype and device of `x`.
    """
    if not rows:
        return x
    parts = [part.to(x.device, x.dtype, non_blocking=True) for part in rows]
    return x.index_copy_(0, given, torch.cat(parts))
