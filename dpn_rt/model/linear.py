"""A linear layer that picks the fastest multiplication for the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt import ops

SIZES_PER_OCTAVE = 16


class Linear:
    """`x @ weight.T + bias` over packed rows.

    A few rows (decoding) are bound by reading the weights and go through our kernel, straight from the mapped file.
    Many rows go to torch. A prepacked copy in oneDNN's own layout makes those up to 10 % faster for the price of the
    weights' size in memory.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, prepack: bool = False) -> None:
        """`weight` `[out_features, in_features]`, `bias` `[out_features]`."""
        self._weight = weight
        self._bias = bias
        self._packed: Tensor | None = torch.ops.mkldnn._reorder_linear_weight(weight) if prepack else None

    def __call__(self, x: Tensor) -> Tensor:
        """`[num_tokens, in_features]` -> `[num_tokens, out_features]`."""
        if not x.is_cpu:
            return functional.linear(x, self._weight, self._bias)
        rows = x.shape[0]
        if rows <= ops.MOST_STREAMED_ROWS or x.dtype != torch.bfloat16:
            return ops.linear(x, self._weight, self._bias)
        # oneDNN compiles a product for every number of rows (0.3 to 1.5 ms, half a megabyte that is kept for 1,024 of
        # them), and ragged batches hardly ever have the same number twice: rows of zeros make the numbers few.
        more = few_sizes(rows) - rows
        result = self._product(functional.pad(x, (0, 0, 0, more)) if more else x)
        return result[:rows] if more else result

    def _product(self, x: Tensor) -> Tensor:
        if self._packed is None:
            return ops.linear(x, self._weight, self._bias)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return result


def few_sizes(rows: int) -> int:
    """The next of few numbers, `SIZES_PER_OCTAVE` between two powers of two: at most that share of work is added."""
    step = max(1, (1 << rows.bit_length() - 1) // SIZES_PER_OCTAVE)
    return -(-rows // step) * step


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether torch was built with oneDNN and multiplies this dtype through it; float32 goes through MKL."""
    return dtype == torch.bfloat16 and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
