"""CLIP's vision tower as a configuration: its sizes, and what follows from them.

Only this package, the builders and the reference read the fields of `ClipConfig`; the rest of the runtime asks what
every `VisionEncoderConfig` answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dpn_rt.model.layer_pair import LayerPair
from dpn_rt.model.linear import linear_specs
from dpn_rt.model.ranks import RankGroup
from dpn_rt.model.reduction.grid import Grid
from dpn_rt.model.vision.clip import names
from dpn_rt.model.vision.encoder import CropEncoder
from dpn_rt.model.vision.one_view import OneView
from dpn_rt.model.vision.preprocessing import Preprocessor
from dpn_rt.model.vision.projector import Projector
from dpn_rt.schema.activation import Activation
from dpn_rt.schema.bounds import Epsilon, Heads, LayerCount, Side, Width
from dpn_rt.schema.weights import NamedSpecs, WeightSpec

SelectFeature = Literal["patch", "cls_patch"]


@dataclass(frozen=True)
class ClipConfig(OneView):
    """A CLIP ViT, cut after the layer whose hidden state is used. A `VisionEncoderConfig`."""

    hidden_size: Width
    intermediate_size: Width
    num_layers: LayerCount
    """Layers that run (select layer -2 of a 24-layer tower: 23)."""
    num_heads: Heads
    image_size: Side
    """Pixels per side of the one view; those beyond a whole number of patches are not read."""
    patch_size: Side
    layer_norm_eps: Epsilon
    activation: Activation
    select_feature: SelectFeature
    """Which rows are used: those of the patches, or the class row before them too."""
    type: Literal["clip"] = "clip"

    @property
    def summary(self) -> str:
        return f"{self.image_size}-pixel images"

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix_rows(self) -> int:
        """Rows inside the tower before those of the patches: the class row."""
        return 1

    @property
    def has_pre_norm(self) -> bool:
        """Whether the rows are normed before the first layer."""
        return True

    @property
    def has_patch_bias(self) -> bool:
        return False

    @property
    def num_rows(self) -> int:
        """Rows of one image inside the tower; each has a position embedding."""
        return self.num_prefix_rows + self.num_patches

    @property
    def num_dropped_rows(self) -> int:
        """First rows of the tower that are no visual tokens."""
        return self.num_prefix_rows if self.select_feature == "patch" else 0

    @property
    def num_visual_tokens(self) -> int:
        """Rows that every image puts into the prompt."""
        return self.num_rows - self.num_dropped_rows

    @property
    def head_dims(self) -> tuple[int, ...]:
        return (self.hidden_size // self.num_heads,)

    @property
    def flops_per_crop(self) -> int:
        hidden, rows = self.hidden_size, self.num_rows
        products = 2 * rows * (4 * hidden * hidden + 2 * hidden * self.intermediate_size)
        attention = 4 * hidden * rows * rows
        patches = 2 * self.num_patches * 3 * self.patch_size**2 * hidden
        return patches + self.num_layers * (products + attention)

    def weight_specs(self, dtype: torch.dtype) -> NamedSpecs:
        """All in `dtype`, in the order of the file."""
        hidden = self.hidden_size
        if self.num_prefix_rows:
            yield names.CLASS_EMBEDDING, WeightSpec((hidden,), dtype)
        yield from linear_specs(names.PATCH_EMBEDDING, hidden, 3 * self.patch_size**2, dtype, bias=self.has_patch_bias)
        yield f"{names.POSITION_EMBEDDING}.weight", WeightSpec((self.num_rows, hidden), dtype)
        if self.has_pre_norm:
            yield from _norm_specs(names.PRE_NORM, hidden, dtype)
        for layer in range(self.num_layers):
            yield from self._layer_specs(layer, dtype)

    def _layer_specs(self, layer: int, dtype: torch.dtype) -> NamedSpecs:
        hidden, inter = self.hidden_size, self.intermediate_size

        def norm(part: str) -> NamedSpecs:
            return _norm_specs(names.layer_module(layer, part), hidden, dtype)

        def linear(part: str, rows: int, columns: int, fused: tuple[int, ...] = ()) -> NamedSpecs:
            module = names.layer_module(layer, part)
            return linear_specs(module, rows, columns, dtype, bias=True, fused=fused, least_bits=8)

        yield from norm(names.NORM1)
        yield from linear(names.QKV, 3 * hidden, hidden, fused=(hidden, hidden, hidden))
        yield from linear(names.OUT, hidden, hidden)
        yield from norm(names.NORM2)
        yield from linear(names.FC1, inter, hidden)
        yield from linear(names.FC2, hidden, inter)

    def layer_pairs(self) -> Iterator[LayerPair]:
        """Attention and MLP of each layer."""
        hidden = self.hidden_size
        for layer in range(self.num_layers):
            qkv, out, fc1, fc2 = (
                names.layer_module(layer, part) for part in (names.QKV, names.OUT, names.FC1, names.FC2)
            )
            yield LayerPair(qkv, (hidden, hidden, hidden), out, hidden, hidden // self.num_heads)
            yield LayerPair(fc1, (self.intermediate_size,), fc2, hidden)

    def problems(self, *, needs_grid: bool) -> Iterator[str]:
        """Sizes that do not fit together, or a class row where every visual token needs a place in the grid."""
        if self.hidden_size % self.num_heads:
            yield f"vision hidden_size {self.hidden_size} is not a multiple of its num_heads {self.num_heads}"
        if self.image_size < self.patch_size:
            yield f"vision image_size {self.image_size} is smaller than its patch_size {self.patch_size}"
        if needs_grid and self.select_feature != "patch":
            yield "pooling needs a grid of visual tokens, but the class token is kept (select feature cls_patch)"

    def preprocessor(self, directory: Path | None, *, pads: bool, max_pixels: int) -> Preprocessor | None:
        """Through transformers' image processor, whose settings are in `directory`."""
        from dpn_rt.model.vision.clip.preprocessing import ClipPreprocessor  # which imports this module

        return None if directory is None else ClipPreprocessor(directory, self, pads=pads, max_pixels=max_pixels)

    def load(
        self, weights: Mapping[str, Tensor], projector: Projector, *, prepack: bool, group: RankGroup | None = None
    ) -> CropEncoder:
        """Tower and projector; takes `vision.*`."""
        from dpn_rt.model.vision.clip.tower import ClipEncoder, ClipTower  # which imports this module

        return ClipEncoder(self, ClipTower(self, weights, prepack=prepack, group=group), projector)


def _norm_specs(module: str, size: int, dtype: torch.dtype) -> NamedSpecs:
    """Weight and bias of a layer norm."""
    yield f"{module}.weight", WeightSpec((size,), dtype)
    yield f"{module}.bias", WeightSpec((size,), dtype)
