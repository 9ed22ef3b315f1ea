"""CLIP's vision tower and the projector, in the engine's dtype, through our kernels.

Weights and arithmetic as transformers' `CLIPVisionModel`, cut after the layer whose hidden state LLaVA uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor

from dpn_rt import ops
from dpn_rt.model.config import ProjectorConfig
from dpn_rt.model.linear import Linear

Activation = Literal["quick_gelu", "gelu"]
SelectFeature = Literal["patch", "cls_patch"]

IMAGES_PER_CALL = 4
"""Images that go through the tower together: enough rows for full speed, few enough to stay in the caches."""


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """A CLIP ViT, cut after the layer whose hidden state is used."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    """Layers that run (select layer -2 of a 24-layer tower: 23)."""
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    activation: Activation
    select_feature: SelectFeature
    type: Literal["clip"] = "clip"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_visual_tokens(self) -> int:
        """Rows that one image puts into the prompt."""
        return self.grid[0] * self.grid[1] + (self.select_feature == "cls_patch")


@dataclass(frozen=True)
class VisionLayerWeights:
    """One layer of the tower."""

    norm1: tuple[Tensor, Tensor]  # weight, bias [hidden_size]
    qkv: Linear  # [3 * hidden_size, hidden_size]
    out: Linear  # [hidden_size, hidden_size]
    norm2: tuple[Tensor, Tensor]  # weight, bias [hidden_size]
    fc1: Linear  # [intermediate_size, hidden_size]
    fc2: Linear  # [hidden_size, intermediate_size]


class VisionTower:
    """Images to visual features."""

    def __init__(self, config: ClipConfig, weights: Mapping[str, Tensor], *, prepack: bool) -> None:
        """Takes `vision.*` from an engine's weights."""

        def linear(name: str) -> Linear:
            return Linear(weights[f"vision.{name}.weight"], weights[f"vision.{name}.bias"], prepack=prepack)

        def norm(name: str) -> tuple[Tensor, Tensor]:
            return weights[f"vision.{name}.weight"], weights[f"vision.{name}.bias"]

        self._config = config
        self._patch_embedding = weights["vision.patch_embedding.weight"]
        position = weights["vision.position_embedding.weight"]
        self._class_row = weights["vision.class_embedding"] + position[0]
        self._patch_positions = position[1:]
        self._pre_norm = norm("pre_norm")
        self._layers = [
            VisionLayerWeights(
                norm1=norm(f"layers.{i}.norm1"),
                qkv=linear(f"layers.{i}.qkv"),
                out=linear(f"layers.{i}.out"),
                norm2=norm(f"layers.{i}.norm2"),
                fc1=linear(f"layers.{i}.fc1"),
                fc2=linear(f"layers.{i}.fc2"),
            )
            for i in range(config.num_layers)
        ]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of the selected layer.

        Args:
            pixel_values: `[num_images, 3, image_size, image_size]`, any float dtype.

        Returns:
            `[num_images, num_visual_tokens, hidden_size]` in the engine's dtype.
        """
        config = self._config
        num_images = pixel_values.shape[0]
        residual = ops.layer_norm(self._embed(pixel_values), *self._pre_norm, config.layer_norm_eps)
        rows_per_image = residual.shape[0] // num_images
        cu_seqlens = torch.arange(0, residual.shape[0] + 1, rows_per_image, dtype=torch.int32, device=residual.device)
        output: Tensor | None = None  # of the last MLP, not yet added to the residual
        for layer in self._layers:
            if output is None:
                x = ops.layer_norm(residual, *layer.norm1, config.layer_norm_eps)
            else:
                x = ops.add_layer_norm(output, residual, *layer.norm1, config.layer_norm_eps, out=output)
            x = layer.out(self._attend(layer.qkv(x), cu_seqlens))
            x = ops.add_layer_norm(x, residual, *layer.norm2, config.layer_norm_eps, out=x)
            x = layer.fc1(x)
            output = layer.fc2(ops.activation(x, config.activation, out=x))
        hidden = residual if output is None else residual.add_(output)
        hidden = hidden.view(num_images, rows_per_image, -1)
        return hidden[:, 1:] if config.select_feature == "patch" else hidden

    def _embed(self, pixel_values: Tensor) -> Tensor:
        """Class row and patch rows of every image, positions added: `[num_images * (num_patches + 1), hidden]`."""
        size, dtype = self._config.patch_size, self._patch_embedding.dtype
        side = self._config.grid[0]
        cropped = pixel_values[:, :, : side * size, : side * size].to(dtype)
        patches = cropped.unfold(2, size, size).unfold(3, size, size)  # [images, 3, rows, columns, size, size]
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, self._patch_embedding.shape[1])
        embedded = ops.linear(patches, self._patch_embedding).view(len(pixel_values), side * side, -1)
        class_rows = self._class_row.expand(len(pixel_values), 1, -1)
        return torch.cat((class_rows, embedded + self._patch_positions), dim=1).flatten(0, 1)

    def _attend(self, qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
        head_dim = self._config.hidden_size // self._config.num_heads
        q, k, v = qkv.view(qkv.shape[0], 3, self._config.num_heads, head_dim).unbind(1)
        return ops.attention(q, k, v, cu_seqlens, causal=False, scale=head_dim**-0.5)


class Projector:
    """Visual features to decoder embeddings."""

    def __init__(self, config: ProjectorConfig, weights: Mapping[str, Tensor], *, prepack: bool) -> None:
        """Takes `projector.*` from an engine's weights."""
        indices = (0, 2) if config.type == "mlp2x_gelu" else (0,)
        self._linears = [
            Linear(weights[f"projector.{i}.weight"], weights.get(f"projector.{i}.bias"), prepack=prepack)
            for i in indices
        ]

    def forward(self, features: Tensor) -> Tensor:
        """`[num_tokens, vision hidden_size]` -> `[num_tokens, decoder hidden_size]`."""
        x = self._linears[0](features)
        for linear in self._linears[1:]:
            x = linear(functional.gelu(x))
        return x


class Encoder(Protocol):
    """Images to decoder rows."""

    def encode(self, pixel_values: Sequence[Tensor]) -> list[Tensor]:
        """Decoder rows `[num_visual_tokens, hidden_size]` of each image `[3, image_size, image_size]` on the CPU."""


class ImageEncoder:
    """An `Encoder`: tower and projector, some images at a time."""

    def __init__(self, tower: VisionTower, projector: Projector) -> None:
        self._tower, self._projector = tower, projector

    def encode(self, pixel_values: Sequence[Tensor]) -> list[Tensor]:
        """Decoder rows of each image."""
        rows: list[Tensor] = []
        for first in range(0, len(pixel_values), IMAGES_PER_CALL):
            rows += self.forward(torch.stack(list(pixel_values[first : first + IMAGES_PER_CALL]))).unbind(0)
        return rows

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[num_images, 3, image_size, image_size]` -> `[num_images, num_visual_tokens, decoder hidden_size]`."""
        features = self._tower.forward(pixel_values)
        return self._projector.forward(features.flatten(0, 1)).view(*features.shape[:2], -1)


def load_encoder(
    vision: ClipConfig | None, projector: ProjectorConfig | None, weights: Mapping[str, Tensor], *, prepack: bool
) -> ImageEncoder | None:
    """Tower and projector, None for an engine without."""
    if vision is None or projector is None:
        return None
    return ImageEncoder(VisionTower(vision, weights, prepack=prepack), Projector(projector, weights, prepack=prepack))
