"""Rows of the table of token embeddings, on the CPU."""

from __future__ import annotations

from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.ops.checked import checked_op


@checked_op
def embedding(table: Tensor, token_ids: Tensor, scale: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Rows of a table, in the dtype of the activations.

    Args:
        table: `[vocab_size, hidden_size]`, float32 or bfloat16, contiguous; or with `scale` 8 bits in tiles, as the
            weight of `linear_int8`.
        token_ids: `[num_tokens]` int64, contiguous. An id below 0 gets row 0: nothing reads its result.
        scale: `[vocab_size]` float32, contiguous: row i of the table is its integers times `scale[i]`, rounded once.
        out: `[num_tokens, hidden_size]`, contiguous; the dtype of a table without `scale`, else float32 or bfloat16. It
            tells the columns and the dtype of a table in tiles, for which it must be given.

    Returns:
        `[num_tokens, hidden_size]`.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device, layout or content.
    """
    out = table.new_empty(len(token_ids), table.shape[-1]) if out is None else out
    _kernels.embedding(out, table, scale, token_ids)
    return out
