"""The published weights that each canonical weight is made of, in every layout."""

from __future__ import annotations

from dataclasses import dataclass

from dpn_rt.builders.arrangement import Arrangement
from dpn_rt.builders.checkpoint import Checkpoint
from dpn_rt.builders.names import LayoutNames, published_modules, weight_names
from dpn_rt.builders.vision_tower import PublishedForm, VisionTower
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.weight_spec import canonical_specs
from dpn_rt.model.reduction.pooling_config import PoolingConfig, expert_module
from dpn_rt.model.vision.clip.names import TOWER
from dpn_rt.model.vision.projector import NEWLINE, PROJECTOR_MODULES


@dataclass(frozen=True)
class Part:
    """One published tensor and the shape that it must have."""

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightSource:
    """How a canonical weight is made: its parts, arranged, one below the other. Without parts it is zero."""

    parts: tuple[Part, ...]
    arrangement: Arrangement = "rows"


def weight_sources(
    model: ModelConfig, checkpoint: Checkpoint, layout_names: LayoutNames, tower: VisionTower | None
) -> dict[str, WeightSource]:
    """The source of every canonical weight of `model`."""
    specs, forms = canonical_specs(model), _experts(model)
    if tower is None:
        names = weight_names(specs, published_modules(model, layout_names, {}))
    else:
        names = weight_names(specs, published_modules(model, layout_names, tower.modules), tower.suffixes)
        forms |= tower.forms
    sources = {}
    for name, spec in specs.items():
        holder = tower.checkpoint if tower is not None and name.startswith(f"{TOWER}.") else checkpoint
        form = forms.get(name)
        shapes = spec.parts if form is None else [form.shape]
        parts = tuple(Part(holder, *part) for part in zip(names[name], shapes, strict=True))
        sources[name] = WeightSource(parts, "rows" if form is None else form.arrangement)
    if not layout_names.projector_bias:
        sources |= {f"{module}.bias": WeightSource(()) for module in PROJECTOR_MODULES if f"{module}.bias" in specs}
    if NEWLINE in specs:
        sources[NEWLINE] = WeightSource((Part(checkpoint, layout_names.newline, specs[NEWLINE].shape),))
    return sources


def _experts(model: ModelConfig) -> dict[str, PublishedForm]:
    """Published forms of the pooling convolutions, by canonical name."""
    if not isinstance(model.reduction, PoolingConfig) or model.reduction.pooling_function != "conv":
        return {}
    return {
        f"{expert_module(index, expert)}.weight": PublishedForm((model.decoder.hidden_size, 1, *kernel), "taps")
        for index, boundary in enumerate(model.reduction.boundaries)
        for expert, kernel in enumerate(boundary.kernels)
    }
