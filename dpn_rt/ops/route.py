"""The router of a boundary, which chooses a pooling expert for each sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.ops.checked import checked_op
from dpn_rt.ops.stream import stream_of


@checked_op
def route(
    hidden: Tensor,
    router_rows: Tensor,
    cu_router_rows: Tensor,
    predictor: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    hidden_weight: Tensor | None = None,
    eps: float = 1e-5,
    biases: Tensor | None = None,
    levels: Tensor | None = None,
    *,
    probs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Probabilities of the experts, and the most probable one, for each sequence.

    Computes mean of the router rows -> LayerNorm -> Linear -> GELU -> Linear -> softmax(logits / 10) in float32.
    Without `norm_weight`, `norm_bias` and `hidden_weight` the mean is the input of the last linear layer (router v2).

    Args:
        hidden: `[num_tokens, hidden_size]`, float32 or bfloat16; rows may be strided.
        router_rows: `[num_router_rows]` int32, rows of `hidden`, grouped by sequence.
        cu_router_rows: `[num_seqs + 1]` int32 start of each sequence's group, then `num_router_rows`.
        predictor: `[num_experts, router_size]` float32; `[num_experts, hidden_size]` without `hidden_weight`.
        norm_weight: `[hidden_size]` float32.
        norm_bias: `[hidden_size]` float32.
        hidden_weight: `[router_size, hidden_size]` float32; published routers have router_size = hidden_size / 4.
        eps: of the LayerNorm.
        biases: `[num_seqs]` float32, finite; give it together with `levels`. `biases[b] * levels[e]` is added to the
            logit of expert e. A bias of 0 does not change a bit of the sequence's probabilities.
        levels: `[num_experts]` int32 level of compression of each expert.
        probs: memory for the result, `[num_seqs, num_experts]` float32, contiguous; None: new memory.

    Returns:
        probs `[num_seqs, num_experts]` float32, and experts `[num_seqs]` int32: the most probable expert, of equal ones
        the first. A sequence without router rows gets expert -1 and probabilities 0. NaN in a sequence's rows makes its
        probabilities NaN; its expert is still in `[0, num_experts)`.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device, layout or content.
    """
    num_seqs = cu_router_rows.shape[0] - 1
    stream, workspace = 0, None
    if hidden.is_cuda:
        stream = stream_of(hidden)
        size = _kernels.route_workspace_size(hidden, cu_router_rows, predictor)
        workspace = torch.empty(size, dtype=torch.float32, device=hidden.device)
    if probs is None:
        probs = torch.empty(max(num_seqs, 0), predictor.shape[0], dtype=torch.float32, device=hidden.device)
    experts = torch.empty(max(num_seqs, 0), dtype=torch.int32, device=hidden.device)
    _kernels.route(
        probs,
        experts,
        hidden,
        router_rows,
        cu_router_rows,
        predictor,
        norm_weight,
        norm_bias,
        hidden_weight,
        eps,
        biases,
        levels,
        workspace,
        stream,
    )
    return probs, experts
