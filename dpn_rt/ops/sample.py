"""The choice of the next token on the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.ops.stream import raw_stream


def sample_greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable token of each row, without a round trip through the host. CUDA only.

    Args:
        logits: `[num_rows, vocab_size]`, float32, bfloat16 or float16; rows may be strided.

    Returns:
        tokens `[num_rows]` int32, the first of the largest logits (a NaN is never larger), and is_finite `[num_rows]`
        int32: 1 where every logit of the row is finite, else 0.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device or layout.
    """
    tokens = torch.empty(logits.shape[:1], dtype=torch.int32, device=logits.device)
    is_finite = torch.empty_like(tokens)
    _kernels.sample_greedy(tokens, is_finite, logits, raw_stream(logits) if logits.is_cuda else 0)
    return tokens, is_finite
