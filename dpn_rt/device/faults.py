"""What CUDA says of a step, told apart: memory that ran out passes, any other error has spoilt the device's context."""

from __future__ import annotations

import torch

ACCELERATOR_ERROR: type[Exception] = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)
"""torch older than 2.8 raises a RuntimeError instead."""
MARK = "CUDA error"
"""In the message of whatever comes from CUDA, be it from torch, its libraries or the kernels."""
NO_MEMORY = ("out of memory", "ALLOC_FAILED")
"""Behind that mark, from pinned memory and from libraries."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had too little memory for a step; the next one may have enough."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and MARK in text and any(name in text for name in NO_MEMORY)
    )


def advice(error: BaseException) -> str:
    """What to do about an error of a step, to end its message with; empty where there is no advice."""
    if is_out_of_memory(error):
        return ": to leave more memory beside the KV cache, lower gpu_memory_utilization or max_num_batched_tokens"
    return ""


def is_fatal(error: BaseException) -> bool:
    """Whether nothing that the device computes from now on can be trusted."""
    if is_out_of_memory(error):
        return False
    return isinstance(error, ACCELERATOR_ERROR) or (isinstance(error, RuntimeError) and MARK in str(error))
