"""The projector: visual features to decoder rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt.model.linear import Linear
from dpn_rt.schema.weights import NamedSpecs, WeightSpec

ProjectorType = Literal["mlp2x_gelu", "linear"]


@dataclass(frozen=True, slots=True)
class ProjectorConfig:
    """One or two linear layers, from the vision encoder's width to the decoder's."""

    type: ProjectorType
    input_size: int
    """Features of a visual token before the projector."""

    @property
    def linears(self) -> tuple[int, ...]:
        """Numbers of the linear layers in the weights' names; 1 is the activation."""
        return (0, 2) if self.type == "mlp2x_gelu" else (0,)

    def weight_specs(self, hidden_size: int, dtype: torch.dtype) -> NamedSpecs:
        """The weights, in the order of the file; `hidden_size` is the decoder's."""
        columns = self.input_size
        for index in self.linears:
            yield f"projector.{index}.weight", WeightSpec((hidden_size, columns), dtype)
            yield f"projector.{index}.bias", WeightSpec((hidden_size,), dtype)
            columns = hidden_size

    def flops(self, num_visual_tokens: int, hidden_size: int) -> int:
        """FLOPs of one image with so many visual tokens; `hidden_size` is the decoder's."""
        weights = self.input_size * hidden_size + (len(self.linears) - 1) * hidden_size * hidden_size
        return 2 * num_visual_tokens * weights


class Projector:
    """Visual features to decoder rows."""

    def __init__(self, config: ProjectorConfig, weights: Mapping[str, Tensor], *, prepack: bool) -> None:
        """Takes `projector.*` from an engine's weights."""
        self._linears = [
            Linear(weights[f"projector.{i}.weight"], weights[f"projector.{i}.bias"], prepack=prepack)
            for i in config.linears
        ]

    def forward(self, features: Tensor) -> Tensor:
        """`[num_tokens, input_size]` -> `[num_tokens, decoder hidden_size]`."""
        x = self._linears[0](features)
        for linear in self._linears[1:]:
            x = linear(functional.gelu(x))
        return x
