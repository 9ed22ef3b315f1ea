"""A linear layer that picks the fastest multiplication for the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dpn_rt import ops


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
        if self._packed is None or x.shape[0] <= ops.MOST_STREAMED_ROWS:
            return ops.linear(x, self._weight, self._bias)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return result


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether torch was built with oneDNN and multiplies this dtype through it; float32 goes through MKL."""
    return dtype == torch.bfloat16 and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
