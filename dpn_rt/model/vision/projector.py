"""The projector: visual features to decoder rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt.model.layer_pair import LayerPair
from dpn_rt.model.linear import linear_specs, load_linear
from dpn_rt.model.ranks import Product, RankGroup, load_row_parallel
from dpn_rt.schema.bounds import Width
from dpn_rt.schema.weights import NamedSpecs, WeightSpec

ProjectorType = Literal["mlp2x_gelu", "linear"]
PREFIX = "projector."
"""Of the canonical names of its weights."""
PROJECTOR_MODULES = (f"{PREFIX}0", f"{PREFIX}2")
"""Canonical names of its linear layers; 1 is the activation."""
NEWLINE = f"{PREFIX}image_newline"
"""Canonical name of the row that ends a line of visual tokens."""


@dataclass(frozen=True)
class ProjectorConfig:
    """One or two linear layers, from the vision encoder's width to the decoder's."""

    type: ProjectorType
    input_size: Width
    """Features of a visual token before the projector."""
    has_newline: bool = False
    """Whether there is a row that ends the lines of images in tiles."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Canonical names of its linear layers."""
        return PROJECTOR_MODULES if self.type == "mlp2x_gelu" else PROJECTOR_MODULES[:1]

    def weight_specs(self, hidden_size: int, dtype: torch.dtype) -> NamedSpecs:
        """The weights, in the order of the file; `hidden_size` is the decoder's."""
        in_features = self.input_size
        for module in self.modules:
            yield from linear_specs(module, hidden_size, in_features, dtype, bias=True, least_bits=8)
            in_features = hidden_size
        if self.has_newline:
            yield NEWLINE, WeightSpec((hidden_size,), dtype)

    def layer_pairs(self, hidden_size: int) -> Iterator[LayerPair]:
        """What ranks may share: two layers. `hidden_size` is the decoder's."""
        if len(self.modules) == 2:
            first, second = self.modules
            yield LayerPair(first, (hidden_size,), second, hidden_size)

    def flops(self, num_visual_tokens: int, hidden_size: int) -> int:
        """FLOPs of one image with so many visual tokens; `hidden_size` is the decoder's."""
        weights = self.input_size * hidden_size + (len(self.modules) - 1) * hidden_size * hidden_size
        return 2 * num_visual_tokens * weights


class Projector:
    """Visual features to decoder rows."""

    def __init__(
        self,
        config: ProjectorConfig,
        weights: Mapping[str, Tensor],
        *,
        prepack: bool,
        group: RankGroup | None = None,
    ) -> None:
        """Takes `projector.*` from the weights of an engine, or of one rank's part: then `group` are all ranks."""
        first, *second = config.modules
        self._linears: list[Product] = [load_linear(weights, first, prepack=prepack)]
        self._linears += [load_row_parallel(weights, module, group, prepack=prepack) for module in second]
        self.newline = weights[NEWLINE] if config.has_newline else None
        """`[decoder hidden_size]`; None for a model whose images have no tiles."""

    def forward(self, features: Tensor) -> Tensor:
        """`[num_tokens, input_size]` -> `[num_tokens, decoder hidden_size]`."""
        x = self._linears[0](features)
        for linear in self._linears[1:]:
            x = linear(functional.gelu(x))
        return x
