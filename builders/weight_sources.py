"""The published weights that each canonical weight is made of, in every layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpn_rt.builders.checkpoint import Checkpoint
from dpn_rt.builders.names import LayoutNames, published_modules, weight_names
from dpn_rt.builders.vision_tower import VisionTower
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.weight_spec import canonical_specs
from dpn_rt.model.reduction.pooling_config import PoolingConfig, expert_module
from dpn_rt.model.vision.clip.names import PATCH_EMBEDDING, TOWER
from dpn_rt.model.vision.projector import PROJECTOR_MODULES
from dpn_rt.schema.weights import WeightSpec


@dataclass(frozen=True)
class Part:
    """One published tensor and the shape that it must have."""

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightSource:
    """How a canonical weight is made.

    "rows": the parts are concatenated by rows; each is flattened to two dimensions if it has more.
    "taps": one depthwise convolution `[hidden_size, 1, kh, kw]` becomes `[kh * kw, hidden_size]`.
    Without parts, the weight is zero.
    """

    parts: tuple[Part, ...]
    assembly: Literal["rows", "taps"] = "rows"


def weight_sources(
    model: ModelConfig, checkpoint: Checkpoint, layout_names: LayoutNames, tower: VisionTower | None
) -> dict[str, WeightSource]:
    """The source of every canonical weight of `model`."""
    specs = canonical_specs(model)
    names = weight_names(specs, published_modules(model, layout_names, "" if tower is None else tower.prefix))
    taps = _experts(model)
    sources = {}
    for name, spec in specs.items():
        holder = tower.checkpoint if tower is not None and name.startswith(f"{TOWER}.") else checkpoint
        shapes = [taps[name]] if name in taps else _published_shapes(model, name, spec)
        parts = tuple(Part(holder, *part) for part in zip(names[name], shapes, strict=True))
        sources[name] = WeightSource(parts, "taps" if name in taps else "rows")
    if not layout_names.projector_bias:
        sources |= {f"{module}.bias": WeightSource(()) for module in PROJECTOR_MODULES if f"{module}.bias" in specs}
    return sources


def _published_shapes(model: ModelConfig, name: str, spec: WeightSpec) -> list[tuple[int, ...]]:
    """Published shape of each part. The patch embedding is published as a convolution."""
    if model.vision is not None and name == f"{PATCH_EMBEDDING}.weight":
        return [(spec.shape[0], 3, model.vision.patch_size, model.vision.patch_size)]
    return spec.parts


def _experts(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Published shapes of the pooling convolutions, by canonical name."""
    if not isinstance(model.reduction, PoolingConfig) or model.reduction.pooling_function != "conv":
        return {}
    return {
        f"{expert_module(index, expert)}.weight": (model.decoder.hidden_size, 1, *kernel)
        for index, boundary in enumerate(model.reduction.boundaries)
        for expert, kernel in enumerate(boundary.kernels)
    }
