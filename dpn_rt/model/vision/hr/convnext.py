"""The slow path: a ConvNeXt on rows of pixels, one image after another in memory, all channels of a pixel together.

So depthwise convolutions, norms over channels and pointwise products all read and write consecutive memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.model.linear import load_linear
from dpn_rt.model.ranks import RankGroup, load_row_parallel
from dpn_rt.model.vision.clip.tower import Affine, load_norm
from dpn_rt.model.vision.hr import names
from dpn_rt.model.vision.hr.convnext_config import STEM_STRIDE, ConvNextConfig
from dpn_rt.model.vision.hr.depthwise import Depthwise

MLP_BLOCK_BYTES = 16 << 20
"""Of the widest activation of an MLP: it is computed for so many rows at a time, so that it takes little memory."""


class ConvNext:
    """Pixel values to the features of the last stage."""

    def __init__(
        self, config: ConvNextConfig, weights: Mapping[str, Tensor], *, prepack: bool, group: RankGroup | None = None
    ) -> None:
        """Takes `vision.slow.*` from the weights of an engine, or of a rank's part of it."""
        self._stem = load_linear(weights, names.STEM, prepack=False)
        self._stem_norm = load_norm(weights, names.STEM_NORM)
        self._stages = [
            Stage(config, weights, stage, prepack=prepack, group=group) for stage in range(len(config.depths))
        ]
        self._eps = config.layer_norm_eps
        self._dtype = weights[f"{names.STEM}.bias"].dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of the last stage.

        Args:
            pixel_values: `[num_images, 3, image_size, image_size]`, any float dtype.

        Returns:
            `[num_images, side, side, channels]`, contiguous.
        """
        x = self._embed(pixel_values.to(self._dtype))
        for stage in self._stages:
            x = stage.forward(x)
        return x

    def _embed(self, pixel_values: Tensor) -> Tensor:
        """The stem: a convolution whose stride is its kernel."""
        num_images, size = len(pixel_values), STEM_STRIDE
        side = pixel_values.shape[-1] // size
        cropped = pixel_values[:, :, : side * size, : side * size]
        patches = cropped.reshape(num_images, 3, side, size, side, size).permute(0, 2, 4, 3, 5, 1)
        rows = self._stem(patches.reshape(num_images * side * side, -1))
        return ops.layer_norm(rows, *self._stem_norm, self._eps, out=rows).view(num_images, side, side, -1)


class Stage:
    """Blocks of one resolution; from the second stage on, half the resolution first."""

    def __init__(
        self,
        config: ConvNextConfig,
        weights: Mapping[str, Tensor],
        stage: int,
        *,
        prepack: bool,
        group: RankGroup | None,
    ) -> None:
        self._eps = config.layer_norm_eps
        self._norm: Affine | None = None
        if stage > 0:
            self._norm = load_norm(weights, names.stage_module(stage, names.DOWNSAMPLE_NORM))
            self._downsample = load_linear(weights, names.stage_module(stage, names.DOWNSAMPLE), prepack=prepack)
        self._blocks = [
            Block(weights, names.block_module(stage, block), config.layer_norm_eps, prepack=prepack, group=group)
            for block in range(config.depths[stage])
        ]

    def forward(self, x: Tensor) -> Tensor:
        """`[num_images, side, side, channels]` -> the same, or half the side and other channels; `x` is overwritten."""
        if self._norm is not None:
            x = self._halved(x, self._norm)
        for block in self._blocks:
            block.add_to(x)
        return x

    def _halved(self, x: Tensor, norm: Affine) -> Tensor:
        num_images, side, _, channels = x.shape
        half = side // 2
        ops.layer_norm(x.view(-1, channels), *norm, self._eps, out=x.view(-1, channels))
        cropped = x[:, : 2 * half, : 2 * half]  # what does not fill a stride is left out
        patches = cropped.reshape(num_images, half, 2, half, 2, channels).permute(0, 1, 3, 2, 4, 5)
        return self._downsample(patches.reshape(-1, 4 * channels)).view(num_images, half, half, -1)


class Block:
    """`x + layer_scale * fc2(gelu(fc1(norm(depthwise(x)))))`."""

    def __init__(
        self, weights: Mapping[str, Tensor], module: str, eps: float, *, prepack: bool, group: RankGroup | None
    ) -> None:
        self._depthwise = Depthwise(weights, f"{module}.{names.DEPTHWISE}")
        self._norm, self._eps = load_norm(weights, f"{module}.{names.NORM}"), eps
        self._fc1 = load_linear(weights, f"{module}.{names.FC1}", prepack=prepack, activation="gelu")
        self._fc2 = load_row_parallel(weights, f"{module}.{names.FC2}", group, prepack=prepack)
        self._layer_scale = weights[f"{module}.{names.LAYER_SCALE}"]

    def add_to(self, x: Tensor) -> None:
        """Adds the block's result to `x` `[num_images, side, side, channels]`, contiguous."""
        rows = x.view(-1, x.shape[-1])
        y = self._depthwise.forward(x).view_as(rows)
        step = rows_per_block(rows.shape[1], x.element_size()) if x.is_cpu else max(1, rows.shape[0])
        for residual, part in zip(torch.split(rows, step), torch.split(y, step), strict=True):
            hidden = self._fc1(ops.layer_norm(part, *self._norm, self._eps, out=part))
            hidden = self._fc2(hidden)
            torch.addcmul(residual, hidden, self._layer_scale, out=residual)


def rows_per_block(channels: int, element_size: int) -> int:
    """Rows that go through an MLP together: a power of two, so that products need no padding."""
    most = max(1, MLP_BLOCK_BYTES // (4 * channels * element_size))
    return 1 << (most.bit_length() - 1)
