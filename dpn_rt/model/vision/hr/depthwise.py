"""Depthwise 7x7 convolutions over rows of pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional

from dpn_rt import ops
from dpn_rt.model.vision.hr.convnext_config import KERNEL


class Depthwise:
    """Each channel by itself: 7x7 taps, stride 1, zeros around the image, and a bias."""

    def __init__(self, weights: Mapping[str, Tensor], module: str) -> None:
        """Takes `weight` `[49, channels]` and `bias` `[channels]` of a module."""
        self.taps, self.bias = weights[f"{module}.weight"], weights[f"{module}.bias"]
        self._convolve: Callable[[Tensor, Tensor, Tensor], Tensor] = ops.depthwise_conv
        if not self.taps.is_cpu:
            self.use_torch()

    def use_torch(self) -> None:
        """Convolve by torch, as on a GPU, which our kernel does not know."""
        filters = self.taps.t().reshape(-1, 1, KERNEL, KERNEL).contiguous()

        def convolve(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
            channels_first = x.permute(0, 3, 1, 2)
            result = functional.conv2d(channels_first, filters, bias, padding=KERNEL // 2, groups=x.shape[-1])
            return result.permute(0, 2, 3, 1).contiguous()

        self._convolve = convolve

    def forward(self, x: Tensor) -> Tensor:
        """`[num_images, height, width, channels]`, contiguous -> the same."""
        return self._convolve(x, self.taps, self.bias)
