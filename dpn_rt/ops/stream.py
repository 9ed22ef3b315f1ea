"""The CUDA stream that kernels are queued on."""

from __future__ import annotations

import torch
from torch import Tensor


def stream_of(tensor: Tensor) -> int:
    """torch's current stream on the tensor's device, as the integer that kernels take; 0 for a tensor on the CPU."""
    stream: int = torch._C._cuda_getCurrentRawStream(tensor.device.index) if tensor.is_cuda else 0
    return stream
