"""Where kernels are queued."""

from __future__ import annotations

import torch
from torch import Tensor


def raw_stream(tensor: Tensor) -> int:
    """torch's current stream on the device of a CUDA tensor, as the integer that kernels take."""
    stream: int = torch._C._cuda_getCurrentRawStream(tensor.device.index)
    return stream
