"""Token ids and images' rows -> the rows that enter the first stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def embed_rows(embedding: Tensor, token_ids: Tensor, given: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Embeddings with other rows in some places.

    Args:
        embedding: `[vocab_size, hidden_size]`.
        token_ids: `[num_rows]`; any id where a row is given.
        given: `[num_given]` int64, which rows are.
        rows: their `[..., hidden_size]` parts in order, of any dtype and device.

    Returns:
        `[num_rows, hidden_size]`, dtype and device of the embedding.
    """
    x = embedding.index_select(0, token_ids)
    if not rows:
        return x
    parts = [part.to(x.device, x.dtype, non_blocking=True) for part in rows]
    return x.index_copy_(0, given, torch.cat(parts))
