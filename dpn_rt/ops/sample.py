"""Chooses the next tokens on the device that holds the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.ops.checked import checked_op
from dpn_rt.ops.stream import stream_of


@checked_op
def sample_greedy(logits: Tensor) -> Tensor:
    """The most probable token of each row, chosen on the logits' device.

    Args:
        logits: `[num_rows, vocab_size]`, float32 or bfloat16; rows may be strided.

    Returns:
        `[num_rows]` int64: the lowest id among the largest logits; -1 where the row has no softmax, because a logit is
        NaN or the largest one is not finite.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device or layout.
    """
    tokens = torch.empty(logits.shape[:1], dtype=torch.int64, device=logits.device)
    _kernels.sample_greedy(tokens, logits, stream_of(logits))
    return tokens


@checked_op
def sample(
    logits: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    keys: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """A random token of each row, drawn on the logits' device.

    It filters tokens as `sampling.filters` does: by min-p, then by top-k, then by top-p of the remaining tokens; of
    equal logits the lower token id comes first. Then it takes the token at which the cumulative distribution, in
    vocabulary order, exceeds the row's random number. Probabilities are summed in fixed point, with a unit of 2^-42 of
    the best token's probability, so a row gets the same token in any batch. The token is that of `sampling.filters`,
    unless rounding decides.

    Args:
        logits: `[num_rows, vocab_size]`, float32 or bfloat16; rows may be strided; at most 2^21 tokens.
        temperatures: `[num_rows]` float32; below 1e-5 a row is greedy.
        top_k: `[num_rows]` int32, 0 or -1 where off.
        top_p: `[num_rows]` float64, 1 where off.
        min_p: `[num_rows]` float32, 0 where off.
        keys: `[num_rows]` int64, the bits of `sampling.filters.stream_key`.
        positions: `[num_rows]` int64 index into the row's stream of random numbers: the number of tokens that were
            sampled before.

    Returns:
        tokens `[num_rows]` int32, and is_finite `[num_rows]` int32: 1 where the row has a softmax, 0 where a logit is
        NaN or the largest one is not finite. Then the token is the lowest id among the largest logits.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device, layout or content.
    """
    tokens = torch.empty(logits.shape[:1], dtype=torch.int32, device=logits.device)
    is_finite = torch.empty_like(tokens)
    depths = torch.empty(logits.shape, dtype=torch.int32, device=logits.device)
    stream = stream_of(logits)
    _kernels.sample(tokens, is_finite, logits, depths, temperatures, top_k, top_p, min_p, keys, positions, stream)
    return tokens, is_finite
