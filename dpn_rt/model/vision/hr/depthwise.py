"""Depthwise 7x7 convolutions over rows of pixels."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from dpn_rt import ops
from dpn_rt.model.vision.hr.convnext_config import KERNEL


class Depthwise:
    """Each channel by itself: 7x7 taps, stride 1, zeros around the image, and a bias."""

    def __init__(self, weights: Mapping[str, Tensor], module: str) -> None:
        """Takes `weight` `[49, channels]` and `bias` `[channels]` of a module."""
        self._taps, self._bias = weights[f"{module}.weight"], weights[f"{module}.bias"]
        self._filters: Tensor | None = None
        if not self._taps.is_cpu:  # torch's own convolution runs there
            self._filters = self._taps.t().reshape(-1, 1, KERNEL, KERNEL).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """`[num_images, height, width, channels]`, contiguous -> the same."""
        if self._filters is None:
            return ops.depthwise_conv(x, self._taps, self._bias)
        channels_first = x.permute(0, 3, 1, 2)
        result = functional.conv2d(channels_first, self._filters, self._bias, padding=KERNEL // 2, groups=x.shape[-1])
        return result.permute(0, 2, 3, 1).contiguous()
