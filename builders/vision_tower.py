"""Finds a vision tower, in the checkpoint or in its own directory."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dpn_rt.builders.arrangement import Arrangement
from dpn_rt.builders.checkpoint import Checkpoint
from dpn_rt.builders.clip_config import clip_config, clip_values_from_shapes
from dpn_rt.builders.json_values import Json, Section, object_of, read_json
from dpn_rt.builders.names import SUFFIXES, Modules, clip_modules, clip_weight
from dpn_rt.builders.quantized.checkpoint import open_checkpoint
from dpn_rt.errors import CheckpointError
from dpn_rt.format.config import VisionConfig
from dpn_rt.model.vision.clip import names as clip
from dpn_rt.model.vision.clip.config import ClipConfig

_OWN_WEIGHTS = (
    clip.CLASS_EMBEDDING,
    f"{clip.PATCH_EMBEDDING}.weight",
    f"{clip.POSITION_EMBEDDING}.weight",
    f"{clip.PRE_NORM}.weight",
    f"{clip.layer_module(0, clip.NORM1)}.weight",
)
"""Weights that only a CLIP or SigLIP vision tower has. The part of a name before one of these is the tower's prefix."""
_ANY_LAYER = (re.escape(clip_weight(weight)).replace(r"\.0\.", r"\.\d+\.") for weight in _OWN_WEIGHTS)
_TOWER_NAME = re.compile(rf"(?P<prefix>(?:.*\.)?)(?:{'|'.join(_ANY_LAYER)})")
_ANYTHING = re.compile(".*")


@dataclass(frozen=True)
class PublishedForm:
    """A published tensor that is arranged in another way than the engine's."""

    shape: tuple[int, ...]
    arrangement: Arrangement


@dataclass(frozen=True)
class VisionTower:
    """A tower's weights and configuration."""

    checkpoint: Checkpoint
    prefix: str
    """Of all names of the tower."""
    config: VisionConfig
    modules: Modules
    """Canonical module -> published modules."""
    forms: Mapping[str, PublishedForm]
    """Canonical weight -> its published form, where that is not a matrix or vector of the same shape."""
    suffixes: Mapping[str, str] = field(default_factory=lambda: SUFFIXES)
    """See `weight_names`."""
    unused: re.Pattern[str] = _ANYTHING
    """What follows the prefix in names of weights that a tower may have and that do not run."""
    directory: Path | None = None
    """The tower's own directory, where it has one."""


def find_tower(
    checkpoint: Checkpoint,
    values: Json | None,
    directory: Path | None,
    select_layer: int,
    select_feature: str,
    note: Callable[[str], None],
) -> VisionTower | None:
    """The CLIP or SigLIP tower of a checkpoint; None when there are no weights of one.

    Weights in the checkpoint are preferred to those in `directory`, since they were trained with the decoder. The
    configuration is that of the directory, else `values` (config.json's `vision_config`), else it is derived from
    the shapes of the weights.

    Raises:
        CheckpointError: the directory holds no vision tower, or the checkpoint two.
        ConfigError: the runtime does not support this kind of tower.
    """
    if directory is not None:
        config = _own_config(directory)
        values = object_of(config, "vision_config") or config
    source, prefix = checkpoint, _find_prefix(checkpoint)
    if prefix is None and directory is not None:
        source = open_checkpoint(directory, _own_config(directory))
        prefix = _find_prefix(source)
        if prefix is None:
            raise CheckpointError(f"{directory}: holds no weights of a CLIP or SigLIP vision tower")
    if prefix is None:
        return None
    if values is None:
        values = clip_values_from_shapes(source.tensors, prefix, note)
    vision = clip_config(values, select_layer, select_feature)
    modules = clip_modules(vision.num_layers, prefix)
    return VisionTower(source, prefix, vision, modules, clip_forms(vision), directory=directory)


def clip_forms(vision: ClipConfig) -> dict[str, PublishedForm]:
    """The patch embedding is published as a convolution."""
    shape = (vision.hidden_size, 3, vision.patch_size, vision.patch_size)
    return {f"{clip.PATCH_EMBEDDING}.weight": PublishedForm(shape, "rows")}


def _own_config(directory: Path) -> Section:
    """config.json of a tower's own directory."""
    return Section(read_json(directory / "config.json"), f"{directory / 'config.json'}: ")


def _find_prefix(checkpoint: Checkpoint) -> str | None:
    matches = (_TOWER_NAME.fullmatch(name) for name in checkpoint.tensors)
    prefixes = {match["prefix"] for match in matches if match}
    prefixes = {prefix for prefix in prefixes if not prefix.endswith("text_model.")}  # CLIP's other half
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{checkpoint.path}: more than one vision tower is not supported, found {', '.join(sorted(prefixes))}"
        )
    return next(iter(prefixes), None)
