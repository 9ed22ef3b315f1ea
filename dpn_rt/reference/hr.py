"""LLaVA-HR's vision tower in plain PyTorch, with the names of published checkpoints; CLIP is transformers' own."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel

from dpn_rt.model.vision.hr.config import NUM_QUARTERS, HrConfig
from dpn_rt.model.vision.hr.convnext_config import KERNEL
from dpn_rt.reference import hf_modules
from dpn_rt.reference.convnext import ConvNext


class HrTower(nn.Module):
    """Pixels to visual features.

    The position embeddings of the fast path are those of its own grid, without a row for the class token.
    """

    def __init__(self, config: HrConfig) -> None:
        super().__init__()
        self.config = config
        channels, size = config.slow.dims[-1], config.hidden_size
        self.slow_vision_tower = nn.ModuleDict({"vision_tower": ConvNext(config.slow)})
        clip = CLIPVisionModel(hf_modules.clip_config(config.fast))
        embeddings = hf_modules.clip_core(clip).embeddings
        embeddings.position_embedding = nn.Embedding(config.fast.num_patches, size)
        self.fast_vision_tower = nn.ModuleDict({"vision_tower": clip})
        self.align_stages_latent = nn.ModuleList(Adapter(size, channels) for _ in range(config.num_adapters))
        mix = nn.ModuleDict({"fast_proj": nn.Linear(size, size), "slow_proj": nn.Linear(channels, size)})
        self.align_stages = nn.ModuleList([mix])

    @property
    def clip(self) -> CLIPVisionModel:
        """The fast path."""
        return cast(CLIPVisionModel, self.fast_vision_tower["vision_tower"])

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.clip.dtype

    def published_names(self) -> dict[str, str]:
        """Own name of each parameter -> the published one: transformers 5 has one level less."""
        own = f"fast_vision_tower.vision_tower.{hf_modules.clip_prefix(self.clip)}"
        published = "fast_vision_tower.vision_tower.vision_model."
        names = [name for name, _ in self.named_parameters()]
        return {name: published + name.removeprefix(own) if name.startswith(own) else name for name in names}

    def restore_unused(self) -> None:
        """Give values to CLIP's weights that do not run, which no engine has, where the tower has none."""
        hf_modules.restore_clip_buffers(self.clip)
        embeddings = hf_modules.clip_core(self.clip).embeddings
        row = embeddings.class_embedding
        embeddings.class_embedding = nn.Parameter(torch.zeros(row.shape, dtype=row.dtype))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Visual features before the projector.

        Args:
            pixel_values: [num_images, 3, side, side] float32, normalised.

        Returns:
            [num_images, num_visual, hidden_size].
        """
        slow = self.slow_features(pixel_values.to(self.dtype))
        return self.mixed(slow, pixel_values)

    def slow_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[num_images, 3, side, side] -> [num_images, channels, side // 32, side // 32]."""
        return cast(torch.Tensor, self.slow_vision_tower["vision_tower"](pixel_values))

    def mixed(self, slow: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """The fast path, with slow features [num_images, channels, ...] mixed in; arguments as in `forward`."""
        side = self.config.fast.grid[0]
        size = self.config.fast.image_size
        small = F.interpolate(pixel_values.float(), (size, size), mode="bilinear", align_corners=True)
        core = hf_modules.clip_core(self.clip)
        patches = core.embeddings.patch_embedding(small.to(self.dtype)).flatten(2).transpose(1, 2)
        y = core.pre_layrnorm(patches + core.embeddings.position_embedding.weight)
        layers = list(core.encoder.layers)
        quarter = len(layers) // NUM_QUARTERS
        for index in range(NUM_QUARTERS):
            for layer in layers[index * quarter : (index + 1) * quarter]:
                y = hf_modules.run_clip_layer(layer, y)
            if index < len(self.align_stages_latent):
                y = self.align_stages_latent[index](y, slow, side)
        mix = cast(nn.ModuleDict, self.align_stages[0])
        fitted = fit(slow, side).flatten(2).transpose(1, 2)
        features = mix["fast_proj"](y) + mix["slow_proj"](fitted)
        if not self.config.prepools:
            return cast(torch.Tensor, features)
        image = features.transpose(1, 2).reshape(len(features), -1, side, side)
        return F.avg_pool2d(image, 2).flatten(2).transpose(1, 2)


class Adapter(nn.Module):
    """Adds slow features to fast ones, after a quarter of the layers."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.slow_conv = nn.Conv2d(channels, channels, 1)
        self.slow_proj = nn.Conv2d(channels, size, 1)
        self.fast_conv = nn.Conv2d(size, size, KERNEL, padding=KERNEL // 2, groups=size)
        self.fast_proj = nn.Conv2d(size, size, 1)
        self.gate = nn.Sequential(nn.Linear(2 * size, size // 2), nn.GELU(), nn.Linear(size // 2, 1), nn.Tanh())

    def forward(self, y: torch.Tensor, slow: torch.Tensor, side: int) -> torch.Tensor:
        """Fast features [num_images, side * side, size] with slow ones [num_images, channels, ...]."""
        z = fit(self.slow_proj(F.gelu(self.slow_conv(slow))), side)
        image = y.transpose(1, 2).reshape(len(y), -1, side, side)
        image = image + self.fast_proj(F.gelu(self.fast_conv(image)))
        gate = self.gate(torch.cat((image.mean((2, 3)), z.mean((2, 3))), dim=1))
        gated: torch.Tensor = image + gate[:, :, None, None] * z
        return gated.flatten(2).transpose(1, 2)


def fit(slow: torch.Tensor, side: int) -> torch.Tensor:
    """[num_images, channels, s, s] -> [num_images, channels, side, side], bilinear with corners aligned, s <= side."""
    if slow.shape[-1] == side:
        return slow
    exact = slow if slow.dtype == torch.float64 else slow.float()
    return F.interpolate(exact, (side, side), mode="bilinear", align_corners=True).to(slow.dtype)
