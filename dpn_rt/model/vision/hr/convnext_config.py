"""The slow path's ConvNeXt as a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dpn_rt.model.layer_pair import LayerPair
from dpn_rt.model.linear import linear_specs
from dpn_rt.model.vision.hr import names
from dpn_rt.schema.bounds import Epsilon, Layers, Width
from dpn_rt.schema.weights import NamedSpecs, WeightSpec

NUM_STAGES = 4
STEM_STRIDE = 4
STRIDE = STEM_STRIDE * 2 ** (NUM_STAGES - 1)
"""Pixels per side of one pixel of the last stage."""
KERNEL = 7
"""Side of the depthwise convolutions."""
MLP_RATIO = 4


@dataclass(frozen=True)
class ConvNextConfig:
    """A ConvNeXt in timm's form, without its last norm and head."""

    depths: tuple[Layers, ...]
    """Blocks of each stage."""
    dims: tuple[Width, ...]
    """Channels of each stage."""
    layer_norm_eps: Epsilon

    def side(self, image_size: int, stage: int = NUM_STAGES - 1) -> int:
        """Pixels per side after a stage: convolutions with a stride leave out what does not fill it."""
        side = image_size // STEM_STRIDE
        for _ in range(stage):
            side //= 2
        return side

    def flops(self, image_size: int) -> int:
        """FLOPs of one image."""
        total, channels = 0, 3
        for stage, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
            pixels = self.side(image_size, stage) ** 2
            taps = STEM_STRIDE**2 if stage == 0 else 4
            block = KERNEL**2 * dim + 2 * MLP_RATIO * dim * dim
            total += 2 * pixels * (taps * channels * dim + depth * block)
            channels = dim
        return total

    def weight_specs(self, dtype: torch.dtype) -> NamedSpecs:
        """All in `dtype`, in the order of the file."""
        channels = 3
        for stage, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
            if stage == 0:
                yield from linear_specs(names.STEM, dim, channels * STEM_STRIDE**2, dtype, bias=True)
                yield from norm_specs(names.STEM_NORM, dim, dtype)
            else:
                yield from norm_specs(names.stage_module(stage, names.DOWNSAMPLE_NORM), channels, dtype)
                yield from linear_specs(
                    names.stage_module(stage, names.DOWNSAMPLE), dim, 4 * channels, dtype, bias=True
                )
            for block in range(depth):
                yield from _block_specs(stage, block, dim, dtype)
            channels = dim

    def layer_pairs(self) -> Iterator[LayerPair]:
        """The MLP of each block."""
        for stage, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
            for block in range(depth):
                fc1, fc2 = (names.block_module(stage, block, part) for part in (names.FC1, names.FC2))
                yield LayerPair(fc1, (MLP_RATIO * dim,), fc2, dim)

    def problems(self) -> Iterator[str]:
        """Sizes that make no network."""
        if len(self.depths) != NUM_STAGES or len(self.dims) != NUM_STAGES:
            yield f"slow tower: expected {NUM_STAGES} stages, got depths {self.depths} and dims {self.dims}"


def _block_specs(stage: int, block: int, dim: int, dtype: torch.dtype) -> NamedSpecs:
    def module(part: str) -> str:
        return names.block_module(stage, block, part)

    yield from depthwise_specs(module(names.DEPTHWISE), dim, dtype)
    yield from norm_specs(module(names.NORM), dim, dtype)
    yield from linear_specs(module(names.FC1), MLP_RATIO * dim, dim, dtype, bias=True, least_bits=8)
    yield from linear_specs(module(names.FC2), dim, MLP_RATIO * dim, dtype, bias=True, least_bits=8)
    yield module(names.LAYER_SCALE), WeightSpec((dim,), dtype)


def depthwise_specs(module: str, channels: int, dtype: torch.dtype) -> NamedSpecs:
    """A depthwise 7x7 convolution: its taps, one row each, and its bias."""
    yield f"{module}.weight", WeightSpec((KERNEL**2, channels), dtype)
    yield f"{module}.bias", WeightSpec((channels,), dtype)


def norm_specs(module: str, size: int, dtype: torch.dtype) -> NamedSpecs:
    """Weight and bias of a layer norm."""
    yield f"{module}.weight", WeightSpec((size,), dtype)
    yield f"{module}.bias", WeightSpec((size,), dtype)
