"""The limits of this machine in this run: rates of matrix multiplication and of memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.measuring.clock import is_cuda, seconds
from dpn_rt.device.host import HostDevice
from dpn_rt.format.flops import layer_weights
from dpn_rt.model.config import DecoderConfig

READ_BYTES = 1 << 30
COPIED_BYTES = 4 << 30
"""Size of the copy on a GPU. It takes a thousand times as long as starting a copy."""
MIN_GEMM_WEIGHT_BYTES = 256 << 20
"""Least bytes of weights in one pass of multiplications, several times the largest cache."""


class GemmLimit:
    """Rate of torch's linear layers with the decoder's shapes and weights that do not stay in the cache."""

    def __init__(self, config: DecoderConfig, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        attention = config.num_heads * config.head_dim
        shapes = (
            (config.qkv_size, config.hidden_size),
            (config.hidden_size, attention),
            (2 * config.intermediate_size, config.hidden_size),
            (config.hidden_size, config.intermediate_size),
        )
        layer_bytes = layer_weights(config) * dtype.itemsize
        self.num_layers = max(1, min(4, MIN_GEMM_WEIGHT_BYTES // layer_bytes))
        self.weights = [
            torch.randn(shape, dtype=dtype, device=device) for _ in range(self.num_layers) for shape in shapes
        ]
        self.inputs = {k: torch.randn(rows, k, dtype=dtype, device=device) for k in {shape[1] for shape in shapes}}
        self.flops = 2 * rows * layer_weights(config) * self.num_layers
        self.device = device

    @torch.inference_mode()
    def measure(self) -> float:
        """FLOP/s of one pass. A pass before it warms up: memory that was idle for a round is slow at first."""
        self._multiply()
        return self.flops / seconds(self._multiply, self.device)

    def _multiply(self) -> None:
        for weight in self.weights:
            F.linear(self.inputs[weight.shape[1]], weight)


class ReadLimit:
    """Rate of memory.

    On the CPU all of torch's threads read a block far larger than the caches, in huge pages where the system has them.
    On a GPU a block is copied, and read and written bytes both count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = COPIED_BYTES if is_cuda(device) else READ_BYTES
        self.block = _memory(size // 8, device).fill_(1)
        self.copy = torch.empty_like(self.block) if is_cuda(device) else None
        self.num_bytes = size if self.copy is None else 2 * size

    @torch.inference_mode()
    def measure(self) -> float:
        """Bytes/s of one pass, after one that warms up."""
        self._move()
        return self.num_bytes / seconds(self._move, self.device)

    def _move(self) -> None:
        if self.copy is None:
            self.block.sum()  # adding integers costs less than reading them
        else:
            self.copy.copy_(self.block)


def _memory(count: int, device: torch.device) -> torch.Tensor:
    """`[count]` int64."""
    if is_cuda(device):
        return torch.empty(count, dtype=torch.int64, device=device)
    return HostDevice().pool((count,), torch.int64)
