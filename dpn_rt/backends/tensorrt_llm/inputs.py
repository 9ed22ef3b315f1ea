"""Inputs of a stage's engine in the context and the generation phase: packed rows, contiguous caches.

All lengths count the rows of one *stage*. A sequence gets shorter at a boundary, and the attention plugin derives a
row's position from these lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CONTEXT, GENERATION = 0, 1
"""Values of `host_request_types`."""
NUM_PERF_KNOBS = 16
"""Length of `host_runtime_perf_knobs`."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class SessionStage:
    """Sizes of one stage."""

    num_layers: int
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    max_rows: int
    """Rows of one sequence, prompt and answer together."""
    is_last: bool


def new_caches(stage: SessionStage, batch: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Zeroed caches, one `[batch, 2, num_kv_heads, max_rows, head_dim]` per layer: keys at index 0, values at 1."""
    shape = (batch, 2, stage.num_kv_heads, stage.max_rows, stage.head_dim)
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(stage.num_layers)]


def context_inputs(stage: SessionStage, hidden: Tensor, lengths: Sequence[int], caches: Sequence[Tensor]) -> Tensors:
    """Inputs for the prompts of new sequences.

    Args:
        stage: to run.
        hidden: `[sum(lengths), hidden_size]`.
        lengths: rows of each sequence in this stage.
        caches: of `new_caches`; the engine fills them.

    Returns:
        Tensors by the engine's input names.

    Raises:
        ValueError: `hidden` has another number of rows, or a sequence has more rows than the stage allows.
    """
    _check_rows(hidden, sum(lengths))
    ends = torch.tensor(lengths, dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
    return _inputs(stage, hidden, caches, CONTEXT, lengths, lengths, [0] * len(lengths), ends)


def generation_inputs(
    stage: SessionStage,
    hidden: Tensor,
    context_lengths: Sequence[int],
    past_lengths: Sequence[int],
    caches: Sequence[Tensor],
) -> Tensors:
    """Inputs for one new row of each sequence.

    Args:
        stage: to run.
        hidden: `[num_seqs, hidden_size]`.
        context_lengths: rows of each sequence's prompt in this stage.
        past_lengths: rows of each sequence that the stage's caches hold.
        caches: of the context phase.

    Returns, Raises: as `context_inputs`.
    """
    _check_rows(hidden, len(past_lengths))
    ends = torch.arange(1, len(past_lengths) + 1, dtype=torch.int32, device="cpu")
    total = [length + 1 for length in past_lengths]
    return _inputs(stage, hidden, caches, GENERATION, context_lengths, total, past_lengths, ends)


def output_names(stage: SessionStage) -> list[str]:
    """Names of the engine's outputs. Each `present_key_value` is the cache of the inputs, at the same address."""
    return ["logits" if stage.is_last else "hidden_states_output"] + [
        f"present_key_value_{layer}" for layer in range(stage.num_layers)
    ]


def _inputs(
    stage: SessionStage,
    hidden: Tensor,
    caches: Sequence[Tensor],
    request_type: int,
    context_lengths: Sequence[int],
    lengths: Sequence[int],
    past_lengths: Sequence[int],
    ends: Tensor,
) -> Tensors:
    """Tensors whose names start with `host_` are on the CPU; the others are on the device of `hidden`."""
    batch, device = len(lengths), hidden.device
    if max(lengths) > stage.max_rows:
        raise ValueError(f"{max(lengths)} rows, expected at most {stage.max_rows}")

    def host(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device="cpu")

    inputs = {
        "hidden_states_input": hidden,
        "context_lengths": host(context_lengths).to(device),
        "host_context_lengths": host(context_lengths),
        "host_request_types": host([request_type] * batch),
        "sequence_length": host(lengths).to(device),
        "host_past_key_value_lengths": host(past_lengths),
        "cache_indirection": torch.zeros((batch, 1, stage.max_rows), dtype=torch.int32, device=device),
        "host_max_attention_window_sizes": host([stage.max_rows] * stage.num_layers),
        "host_sink_token_length": host([0]),
        "host_runtime_perf_knobs": host([-1] * NUM_PERF_KNOBS, torch.int64),
        "host_context_progress": host([0], torch.int64),
    }
    if stage.is_last:
        inputs["last_token_ids"] = ends.to(device)
    return inputs | {f"past_key_value_{layer}": cache for layer, cache in enumerate(caches)}


def _check_rows(hidden: Tensor, expected: int) -> None:
    if hidden.shape[0] != expected:
        raise ValueError(f"{hidden.shape[0]} rows, expected {expected}")
