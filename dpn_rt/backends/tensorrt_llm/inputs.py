"""Inputs of a stage's engine in the context and the generation phase: packed rows, contiguous caches.

Every length is the *stage's*: after a boundary a sequence is shorter, and the attention plugin takes a row's position
from these lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CONTEXT, GENERATION = 0, 1
"""Types of a request."""
NUM_PERF_KNOBS = 16

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class SessionStage:
    """Shape of one stage."""

    num_layers: int
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    max_rows: int
    """Rows of one sequence, prompt and answer together."""
    is_last: bool


def new_caches(stage: SessionStage, batch: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Per layer `[batch, 2, num_kv_heads, max_rows, head_dim]`: keys, then values."""
    shape = (batch, 2, stage.num_kv_heads, stage.max_rows, stage.head_dim)
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(stage.num_layers)]


def context_inputs(stage: SessionStage, hidden: Tensor, lengths: Sequence[int], caches: Sequence[Tensor]) -> Tensors:
    """New sequences.

    Args:
        stage: that they go through.
        hidden: `[sum(lengths), hidden_size]`.
        lengths: rows of each sequence in this stage.
        caches: of `new_caches`; filled.
    """
    _check_rows(hidden, sum(lengths))
    ends = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return _inputs(stage, hidden, caches, CONTEXT, lengths, lengths, [0] * len(lengths), ends)


def generation_inputs(
    stage: SessionStage,
    hidden: Tensor,
    context_lengths: Sequence[int],
    past_lengths: Sequence[int],
    caches: Sequence[Tensor],
) -> Tensors:
    """One new row for each sequence.

    Args:
        stage: that the rows go through.
        hidden: `[num_seqs, hidden_size]`.
        context_lengths: rows of each sequence in this stage when its prompt was computed.
        past_lengths: rows that the caches hold of each in this stage.
        caches: of the context phase.
    """
    _check_rows(hidden, len(past_lengths))
    ends = torch.arange(1, len(past_lengths) + 1, dtype=torch.int32)
    total = [length + 1 for length in past_lengths]
    return _inputs(stage, hidden, caches, GENERATION, context_lengths, total, past_lengths, ends)


def output_names(stage: SessionStage) -> list[str]:
    """What the engine gives; each `present_key_value` is the cache that went in, at the same address."""
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
    """Tensors whose names begin with `host_` stay on the CPU, the others are where `hidden` is."""
    batch, device = len(lengths), hidden.device
    if max(lengths) > stage.max_rows:
        raise ValueError(f"{max(lengths)} rows, expected at most {stage.max_rows}")

    def host(values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype)

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
