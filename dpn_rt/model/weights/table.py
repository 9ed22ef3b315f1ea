"""The table of token embeddings: rows are looked up in it, and nothing is multiplied."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.model.weights.forms import form_of

_DTYPES_OF_THE_OP = (torch.float32, torch.bfloat16, torch.uint8)
"""Of a table: what `ops.embedding` takes, the last in tiles."""


class EmbeddingTable:
    """`[vocab_size, hidden_size]` in the form that the engine has: its dtype, or 8 bits with a scale for each row."""

    def __init__(self, tensors: Mapping[str, Tensor], module: str, hidden_size: int, dtype: torch.dtype) -> None:
        """
        Args:
            tensors: of the engine, by canonical name; not copied.
            module: canonical name of the table.
            hidden_size: columns, without those that fill the last tile.
            dtype: of the rows.
        """
        self._hidden_size, self._dtype = hidden_size, dtype
        self._scale: Tensor | None = None
        self._stored = tensors[f"{module}.{form_of(tensors, module).suffix}"]
        if self._stored.dtype.itemsize == 1:
            self._scale = tensors[f"{module}.scale"]

    def rows(self, token_ids: Tensor) -> Tensor:
        """`[num_rows]` int32 or int64 -> `[num_rows, hidden_size]`.

        Raises:
            KernelArgumentError: on the CPU, an id is not in the table.
        """
        if self._stored.is_cpu and self._stored.dtype in _DTYPES_OF_THE_OP:
            token_ids = token_ids if token_ids.dtype == torch.int64 else token_ids.long()
            out = torch.empty(len(token_ids), self._hidden_size, dtype=self._dtype, device=self._stored.device)
            return ops.embedding(self._stored, token_ids, self._scale, out=out)
        if self._scale is None:
            return self._stored.index_select(0, token_ids)
        values = self._numbers(token_ids)[:, : self._hidden_size].float()
        return values.mul_(self._scale.index_select(0, token_ids)[:, None]).to(self._dtype)

    def _numbers(self, token_ids: Tensor) -> Tensor:
        """Rows as they are stored: int8 row by row on a GPU, or 8-bit floats."""
        numbers = self._stored.view(torch.uint8).index_select(0, token_ids)  # which moves bytes in any dtype
        return numbers.view(self._stored.dtype)
