"""How slow features get into the fast path: an adapter after each quarter of its layers, and the sum at its end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt import ops
from dpn_rt.model.linear import load_linear
from dpn_rt.model.vision.hr import names
from dpn_rt.model.vision.hr.depthwise import Depthwise


class Adapter:
    """Adds a convolution of the fast features to them, then slow features by a gate that sees both."""

    def __init__(self, weights: Mapping[str, Tensor], index: int, side: int, *, prepack: bool) -> None:
        """
        Args:
            weights: of the engine; takes `vision.adapters.{index}.*`.
            index: of the adapter.
            side: rows and columns of the fast features.
            prepack: see `Linear`.
        """

        def module(part: str) -> str:
            return names.adapter_module(index, part)

        self._side = side
        self._slow_conv = load_linear(weights, module(names.SLOW_CONV), prepack=prepack)
        self._slow_proj = load_linear(weights, module(names.SLOW_PROJ), prepack=prepack)
        self._fast_conv = Depthwise(weights, module(names.FAST_CONV))
        self._fast_proj = load_linear(weights, module(names.FAST_PROJ), prepack=prepack)
        self._gate_hidden = load_linear(weights, module(names.GATE_HIDDEN), prepack=False)
        self._gate = load_linear(weights, module(names.GATE), prepack=False)

    def add_to(self, y: Tensor, slow: Tensor) -> None:
        """Changes the fast features.

        Args:
            y: `[num_images * side * side, hidden_size]`, contiguous; overwritten.
            slow: `[num_images, slow_side, slow_side, channels]` of the slow path.
        """
        num_images, hidden_size = slow.shape[0], y.shape[1]
        z = self._slow_features(slow)
        conv = self._fast_conv.forward(y.view(num_images, self._side, self._side, hidden_size)).view_as(y)
        y += self._fast_proj(ops.activation(conv, "gelu", out=conv))
        per_image = y.view(num_images, -1, hidden_size), z.view(num_images, -1, hidden_size)
        mean = torch.cat([rows.mean(dim=1, dtype=torch.float32) for rows in per_image], dim=1).to(y.dtype)
        gate = self._gate_hidden(mean)
        gate = torch.tanh(self._gate(ops.activation(gate, "gelu", out=gate)))
        torch.addcmul(per_image[0], per_image[1], gate.view(num_images, 1, 1), out=per_image[0])

    def _slow_features(self, slow: Tensor) -> Tensor:
        """`[num_images * side * side, hidden_size]`."""
        hidden = self._slow_conv(slow.view(-1, slow.shape[-1]))
        hidden = self._slow_proj(ops.activation(hidden, "gelu", out=hidden))
        return fit(hidden.view(*slow.shape[:3], -1), self._side).view(-1, hidden.shape[1])


class Mix:
    """The sum of both paths after the last layer, projected."""

    def __init__(self, weights: Mapping[str, Tensor], side: int, *, prepack: bool) -> None:
        """Takes `vision.mix.*`; `side` is that of the fast features."""
        self._side = side
        self._fast_proj = load_linear(weights, names.mix_module(names.FAST_PROJ), prepack=prepack)
        self._slow_proj = load_linear(weights, names.mix_module(names.SLOW_PROJ), prepack=prepack)

    def forward(self, y: Tensor, slow: Tensor) -> Tensor:
        """`[num_images * side * side, hidden_size]` of the fast path -> the same, with the slow path's features."""
        return self._fast_proj(y).add_(self._slow_proj(fit(slow, self._side).view(-1, slow.shape[-1])))


def fit(slow: Tensor, side: int) -> Tensor:
    """Slow features on the fast path's grid: bilinear with corners aligned, in float32.

    Args:
        slow: `[num_images, slow_side, slow_side, channels]`, with at most `side` rows and columns.
        side: rows and columns wanted.

    Returns:
        `[num_images, side, side, channels]`, contiguous, dtype of `slow`.
    """
    if slow.shape[1] == side:
        return slow
    image = slow.permute(0, 3, 1, 2).float()
    fitted = functional.interpolate(image, (side, side), mode="bilinear", align_corners=True)
    return fitted.permute(0, 2, 3, 1).to(slow.dtype).contiguous()
