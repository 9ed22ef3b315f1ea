"""What this machine can do in this run: rate of matrix multiplication, and rate of reading memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from dpn_rt.config import DecoderConfig
from dpn_rt.flops import layer_weights

READ_BYTES = 1 << 30
MIN_GEMM_WEIGHT_BYTES = 256 << 20
"""Weights that the multiplications walk through: several times the largest cache."""


class GemmLimit:
    """torch's own linear layers on the decoder's shapes, with weights that do not stay in the cache."""

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
        self.synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    @torch.inference_mode()
    def measure(self) -> float:
        """FLOP/s of one pass."""
        self.synchronize()
        start = time.perf_counter()
        for weight in self.weights:
            F.linear(self.inputs[weight.shape[1]], weight)
        self.synchronize()
        return self.flops / (time.perf_counter() - start)


class ReadLimit:
    """Reads a block far larger than the caches with all of torch's threads."""

    def __init__(self, device: torch.device) -> None:
        self.block = torch.ones(READ_BYTES // 8, dtype=torch.int64, device=device)
        self.synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    @torch.inference_mode()
    def measure(self) -> float:
        """Bytes/s of one pass; the sum of integers costs less than reading them."""
        self.synchronize()
        start = time.perf_counter()
        self.block.sum()
        self.synchronize()
        return READ_BYTES / (time.perf_counter() - start)
