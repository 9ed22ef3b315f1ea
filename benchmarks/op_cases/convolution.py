"""Depthwise convolutions of ConvNeXt-L at 1024 pixels and of LLaVA-HR's adapters, beside torch's with channels last."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.measuring.clock import Run
from benchmarks.op_cases.cases import Case
from dpn_rt import ops

SIZES = ((192, 256), (384, 128), (768, 64), (1536, 32), (1024, 32))
"""Channels, and pixels per side."""


def convolution_cases(dtype: torch.dtype) -> list[Case]:
    """CPU only: on a GPU the op is torch's."""
    return [_case(channels, side, dtype) for channels, side in SIZES]


def _case(channels: int, side: int, dtype: torch.dtype) -> Case:
    def inputs() -> tuple[Run, Run]:
        x, taps = torch.randn(1, side, side, channels).to(dtype), torch.randn(49, channels).to(dtype)
        bias, filters = torch.randn(channels).to(dtype), taps.t().reshape(-1, 1, 7, 7).contiguous()
        channels_last = x.permute(0, 3, 1, 2)
        return (
            lambda: ops.depthwise_conv(x, taps, bias),
            lambda: F.conv2d(channels_last, filters, bias, padding=3, groups=channels),
        )

    size = side * side * channels
    num_bytes = size * dtype.itemsize
    return Case("depthwise_conv", f"{side} x {side} x {channels}", inputs, num_bytes, num_bytes, flops=2 * 49 * size)
