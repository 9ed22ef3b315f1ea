"""CLIP's vision tower in the engine's dtype, through our kernels.

Weights and arithmetic as transformers' `CLIPVisionModel`, cut after the layer whose hidden state LLaVA uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.model.linear import Linear, load_linear
from dpn_rt.model.ranks import Product, RankGroup, load_row_parallel
from dpn_rt.model.vision.clip import names
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.encoder import EncodedImage
from dpn_rt.model.vision.projector import Projector
from dpn_rt.model.vision.visual_input import VisualInput
from dpn_rt.schema.activation import Activation

CROPS_PER_CALL = 4
"""Images that go through the tower together: enough rows for full speed, few enough to stay in the caches."""

Affine = tuple[Tensor, Tensor]
"""Weight and bias of a layer norm, `[hidden_size]` each."""


@dataclass(frozen=True)
class ClipLayer:
    """Weights of one layer, or of one rank's part: it has some heads, and some columns of the MLP."""

    norm1: Affine
    qkv: Linear  # [3 * hidden_size, hidden_size]
    out: Product  # [hidden_size, hidden_size]
    norm2: Affine
    fc1: Linear  # [intermediate_size, hidden_size], and the activation
    fc2: Product  # [hidden_size, intermediate_size]


class ClipEncoder:
    """A `CropEncoder`: tower and projector. Every image is one crop with one view."""

    crops_per_call = CROPS_PER_CALL

    def __init__(self, config: ClipConfig, tower: ClipTower, projector: Projector) -> None:
        self.config = config
        self._tower, self._projector = tower, projector

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """`[num_images, 3, image_size, image_size]` -> `[num_images, num_visual_tokens, decoder hidden_size]`."""
        (pixel_values,) = views
        features = self._tower.forward(pixel_values)
        return self._projector.forward(features.flatten(0, 1)).view(*features.shape[:2], -1)

    def assemble(self, image: VisualInput, crops: Sequence[Tensor]) -> EncodedImage:
        """The rows of the one crop."""
        (rows,) = crops
        return EncodedImage(rows, self.config.grid)


class ClipTower:
    """Pixel values to visual features."""

    def __init__(
        self, config: ClipConfig, weights: Mapping[str, Tensor], *, prepack: bool, group: RankGroup | None = None
    ) -> None:
        """Takes what `config.weight_specs` names from the weights of an engine, or of a rank's part of it."""
        self._config = config
        self._patch_embedding = load_linear(weights, names.PATCH_EMBEDDING, prepack=False)
        positions = weights[f"{names.POSITION_EMBEDDING}.weight"]
        self._prefix_rows = positions[: config.num_prefix_rows]
        if config.num_prefix_rows:
            self._prefix_rows = weights[names.CLASS_EMBEDDING] + self._prefix_rows
        self._patch_positions = positions[config.num_prefix_rows :]
        self._pre_norm = load_norm(weights, names.PRE_NORM) if config.has_pre_norm else None
        self.layers = [
            load_layer(weights, config, f"{names.LAYERS}.{layer}", prepack=prepack, group=group)
            for layer in range(config.num_layers)
        ]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of the selected layer.

        Args:
            pixel_values: `[num_images, 3, image_size, image_size]`, any float dtype.

        Returns:
            `[num_images, num_visual_tokens, hidden_size]` in the engine's dtype.
        """
        config, num_images = self._config, pixel_values.shape[0]
        x = self.embed(pixel_values)
        num_rows = x.shape[0]
        cu_seqlens = torch.arange(0, num_rows + 1, config.num_rows, dtype=torch.int32, device=x.device)
        hidden = run_layers(self.layers, x, cu_seqlens, config).view(num_images, config.num_rows, -1)
        return hidden[:, config.num_dropped_rows :]

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Hidden states before the first layer.

        Args:
            pixel_values: `[num_images, 3, image_size, image_size]`, any float dtype.

        Returns:
            `[num_images * num_rows, hidden_size]` rows of every image, prefix rows first, with positions, normed if the
            tower norms them.
        """
        size, dtype = self._config.patch_size, self._prefix_rows.dtype
        height, width = self._config.grid
        cropped = pixel_values[:, :, : height * size, : width * size].to(dtype)
        patches = cropped.unfold(2, size, size).unfold(3, size, size)  # [images, 3, rows, columns, size, size]
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * size**2)
        embedded = self._patch_embedding(patches).view(len(pixel_values), height * width, -1)
        prefix_rows = self._prefix_rows.expand(len(pixel_values), -1, -1)
        x = torch.cat((prefix_rows, embedded + self._patch_positions), dim=1).flatten(0, 1)
        if self._pre_norm is None:
            return x
        return ops.layer_norm(x, *self._pre_norm, self._config.layer_norm_eps, out=x)


def load_layer(
    weights: Mapping[str, Tensor], config: ClipConfig, prefix: str, *, prepack: bool, group: RankGroup | None
) -> ClipLayer:
    """One layer of an engine's weights; `prefix` without its dot."""

    def linear(part: str, activation: Activation | None = None) -> Linear:
        return load_linear(weights, f"{prefix}.{part}", prepack=prepack, activation=activation, ragged=False)

    def row_parallel(part: str) -> Product:
        return load_row_parallel(weights, f"{prefix}.{part}", group, prepack=prepack, ragged=False)

    def norm(part: str) -> Affine:
        return load_norm(weights, f"{prefix}.{part}")

    return ClipLayer(
        norm1=norm(names.NORM1),
        qkv=linear(names.QKV),
        out=row_parallel(names.OUT),
        norm2=norm(names.NORM2),
        fc1=linear(names.FC1, config.activation),
        fc2=row_parallel(names.FC2),
    )


def load_norm(weights: Mapping[str, Tensor], module: str) -> Affine:
    """One layer norm of an engine's weights."""
    return weights[f"{module}.weight"], weights[f"{module}.bias"]


def run_layers(layers: Sequence[ClipLayer], x: Tensor, cu_seqlens: Tensor, config: ClipConfig) -> Tensor:
    """Hidden states after some layers.

    Args:
        layers: in order; any run of a tower's layers.
        x: `[num_rows, hidden_size]` hidden states before them; overwritten.
        cu_seqlens: `[num_images + 1]` int32 first row of each image.
        config: of the tower.

    Returns:
        `[num_rows, hidden_size]`, in the memory of `x`.
    """
    residual = x
    output: Tensor | None = None  # of the last MLP, not yet added to the residual
    for layer in layers:
        if output is None:
            x = ops.layer_norm(residual, *layer.norm1, config.layer_norm_eps)
        else:
            x = ops.add_layer_norm(output, residual, *layer.norm1, config.layer_norm_eps, out=output)
        x = layer.out(_attend(layer.qkv(x), cu_seqlens, config))
        x = ops.add_layer_norm(x, residual, *layer.norm2, config.layer_norm_eps, out=x)
        output = layer.fc2(layer.fc1(x))
    return residual if output is None else residual.add_(output)


def _attend(qkv: Tensor, cu_seqlens: Tensor, config: ClipConfig) -> Tensor:
    """`[num_rows, 3 * num_heads * head_dim]` -> `[num_rows, num_heads * head_dim]`, of the heads that there are.

    Every row of an image sees all its rows.
    """
    head_dim = config.hidden_size // config.num_heads
    q, k, v = qkv.view(qkv.shape[0], 3, -1, head_dim).unbind(1)
    return ops.attention(q, k, v, cu_seqlens, causal=False, scale=head_dim**-0.5)
