"""Kinds of CUDA errors: after one for lack of memory the device still works; any other leaves its context unusable."""

from __future__ import annotations

import torch

from dpn_rt.errors import DeviceError

ACCELERATOR_ERROR: type[Exception] = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)
"""torch's class for CUDA errors; torch before 2.8 lacks it and raises RuntimeError."""
MARK = "CUDA error"
"""Part of the message of every CUDA error, from torch, from its libraries and from the kernels."""
NO_MEMORY = ("out of memory", "ALLOC_FAILED")
"""Messages with `MARK` and one of these report a lack of memory; pinned memory and libraries raise them."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had too little memory for a step. A later step may have enough."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and MARK in text and any(name in text for name in NO_MEMORY)
    )


def advice(error: BaseException) -> str:
    """Advice to append to the message of a step's error; empty where there is none."""
    if is_out_of_memory(error):
        return ": to leave more memory beside the KV cache, lower gpu_memory_utilization or max_num_batched_tokens"
    return ""


def is_fatal(error: BaseException) -> bool:
    """Whether all later results of the device are invalid."""
    if is_out_of_memory(error):
        return False
    if isinstance(error, DeviceError):
        return True
    return isinstance(error, ACCELERATOR_ERROR) or (isinstance(error, RuntimeError) and MARK in str(error))
