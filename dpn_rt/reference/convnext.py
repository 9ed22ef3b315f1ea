"""ConvNeXt in plain PyTorch, in timm's form and with the names of published LLaVA-HR checkpoints."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from dpn_rt.model.vision.hr.convnext_config import KERNEL, MLP_RATIO, STEM_STRIDE, ConvNextConfig


class ConvNext(nn.Module):
    """Up to the last stage: without its norm and head, which LLaVA-HR does not use."""

    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__()
        dims, eps = config.dims, config.layer_norm_eps
        stem = nn.Conv2d(3, dims[0], STEM_STRIDE, stride=STEM_STRIDE)
        self.stem = nn.Sequential(stem, ChannelNorm(dims[0], eps=eps))
        before = (dims[0], *dims[:-1])
        self.stages = nn.ModuleList(
            Stage(before[stage], dim, depth, eps, halves=stage > 0)
            for stage, (dim, depth) in enumerate(zip(dims, config.depths, strict=True))
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[num_images, 3, side, side] -> [num_images, channels, side // 32, side // 32]."""
        x = cast(torch.Tensor, self.stem(pixels))
        for stage in self.stages:
            x = stage(x)
        return x


class Stage(nn.Module):
    """Blocks of one resolution; from the second stage on, half the resolution first."""

    def __init__(self, in_channels: int, channels: int, depth: int, eps: float, *, halves: bool) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if halves:
            conv = nn.Conv2d(in_channels, channels, 2, stride=2)
            self.downsample = nn.Sequential(ChannelNorm(in_channels, eps=eps), conv)
        self.blocks = nn.Sequential(*(Block(channels, eps) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_images, in_channels, height, width] -> [num_images, channels, ...]."""
        return cast(torch.Tensor, self.blocks(self.downsample(x)))


class Block(nn.Module):
    """`x + weight * fc2(gelu(fc1(norm(conv_dw(x)))))`."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, KERNEL, padding=KERNEL // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=eps)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(channels, MLP_RATIO * channels), "fc2": nn.Linear(MLP_RATIO * channels, channels)}
        )
        self.weight = nn.Parameter(torch.full((channels,), 1e-6))
        """Layer scale; timm calls it gamma."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape [num_images, channels, height, width] is kept."""
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](y)))
        scaled: torch.Tensor = y * self.weight
        return x + scaled.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [num_images, channels, height, width]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Shape is kept."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
