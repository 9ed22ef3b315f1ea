"""Find a CLIP vision tower (inside the checkpoint or in a directory of its own) and read its configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from dpn_rt.builders.checkpoint import Checkpoint
from dpn_rt.builders.json_values import Json, choice_of, object_of, read_json, square_side, value_of
from dpn_rt.builders.names import CLIP_LAYERS, clip_modules, weight_names
from dpn_rt.builders.shards import TensorInfo
from dpn_rt.errors import CheckpointError, ConfigError
from dpn_rt.model.vision.clip import names as clip
from dpn_rt.model.vision.clip.config import Activation, ClipConfig, SelectFeature

_PATCHES, _POSITIONS, _PRE_NORM, _NORM1, _FC1 = (
    f"{module}.weight"
    for module in (
        *(clip.PATCH_EMBEDDING, clip.POSITION_EMBEDDING, clip.PRE_NORM),
        *(clip.layer_module(0, part) for part in (clip.NORM1, clip.FC1)),
    )
)

CLIP_VIT_HEAD_DIM = 64
"""Of every CLIP ViT that OpenAI published; used only where no configuration names the number of heads."""


@dataclass(frozen=True, slots=True)
class VisionTower:
    """Where the tower's weights are, and what the tower is."""

    checkpoint: Checkpoint
    prefix: str
    config: ClipConfig
    directory: Path | None
    """The tower's own directory, where it has one."""


def find_tower(
    checkpoint: Checkpoint,
    clip_values: Json | None,
    directory: Path | None,
    select_layer: int,
    select_feature: str,
    note: Callable[[str], None],
) -> VisionTower | None:
    """The vision tower of a checkpoint; None when there are no weights of one.

    Weights inside the checkpoint come before those of `directory`: they were trained with the decoder. The directory's
    configuration comes before `clip_values` (config.json's `vision_config`), and last come the weights' own shapes.

    Raises:
        CheckpointError: the directory holds no vision tower, or the checkpoint two.
        ConfigError: the tower is of a kind that the runtime does not do.
    """
    if directory is not None:
        config = read_json(directory / "config.json")
        clip_values = object_of(config, "vision_config") or config
    source, prefix = checkpoint, _find_prefix(checkpoint)
    if prefix is None and directory is not None:
        source = Checkpoint(directory)
        prefix = _find_prefix(source)
        if prefix is None:
            raise CheckpointError(f"{directory}: holds no weights of a CLIP vision tower")
    if prefix is None:
        return None
    if clip_values is None:
        clip_values = _values_from_shapes(source.tensors, prefix, note)
    return VisionTower(source, prefix, _vision_config(clip_values, select_layer, select_feature), directory)


def _published(canonical: str) -> str:
    """The name of a weight in CLIP's own spelling; of layers, only those of layer 0."""
    (name,) = weight_names((canonical,), clip_modules(1, ""))[canonical]
    return name


# Names that only a CLIP vision tower has, of any layer; what stands before them is the tower's prefix.
_OWN_NAMES = "|".join(
    re.escape(_published(name)).replace(r"\.0\.", r"\.\d+\.")
    for name in (clip.CLASS_EMBEDDING, _PATCHES, _POSITIONS, _PRE_NORM, _NORM1)
)
_TOWER_NAME = re.compile(rf"(?P<prefix>(?:.*\.)?)(?:{_OWN_NAMES})")


def _find_prefix(checkpoint: Checkpoint) -> str | None:
    matches = (_TOWER_NAME.fullmatch(name) for name in checkpoint.tensors)
    prefixes = {match["prefix"] for match in matches if match}
    prefixes = {prefix for prefix in prefixes if not prefix.endswith("text_model.")}  # CLIP's other half
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{checkpoint.path}: more than one vision tower is not supported, found {', '.join(sorted(prefixes))}"
        )
    return next(iter(prefixes), None)


def _vision_config(values: Json, select_layer: int, select_feature: str) -> ClipConfig:
    choice_of(values, "model_type", ("clip_vision_model",), "clip_vision_model")
    if value_of(values, "num_channels", int, 3) != 3:
        raise ConfigError(f"config.json: num_channels: expected 3, got {values['num_channels']}")
    num_layers = value_of(values, "num_hidden_layers", int, 12)
    if not -num_layers - 1 <= select_layer <= num_layers:
        raise ConfigError(
            f"config.json: vision select layer {select_layer} does not exist: a tower of {num_layers} layers has "
            f"hidden states {-num_layers - 1} to {num_layers}"
        )
    return ClipConfig(  # absent values are those of transformers' CLIPVisionConfig
        hidden_size=value_of(values, "hidden_size", int, 768),
        intermediate_size=value_of(values, "intermediate_size", int, 3072),
        num_layers=select_layer if select_layer >= 0 else num_layers + 1 + select_layer,
        num_heads=value_of(values, "num_attention_heads", int, 12),
        image_size=square_side(values, "image_size", 224),
        patch_size=square_side(values, "patch_size", 32),
        layer_norm_eps=value_of(values, "layer_norm_eps", float, 1e-5),
        activation=cast(Activation, choice_of(values, "hidden_act", ("quick_gelu", "gelu"), "quick_gelu")),
        select_feature=cast(SelectFeature, select_feature),
    )


def _values_from_shapes(tensors: Mapping[str, TensorInfo], prefix: str, note: Callable[[str], None]) -> Json:
    """What CLIP's configuration would say, as far as shapes tell; the rest is what OpenAI's CLIP ViTs share."""

    def shape(canonical: str, rank: int) -> tuple[int, ...]:
        name = _published(canonical)
        info = tensors.get(prefix + name)
        if info is None or len(info.shape) != rank:
            found = "missing" if info is None else f"of shape {list(info.shape)}"
            raise CheckpointError(
                f"vision tower: {prefix}{name} is {found}, so the tower's configuration cannot be told; "
                "name its directory with --vision-tower"
            )
        return info.shape

    hidden, _, patch, _ = shape(_PATCHES, 4)
    side = math.isqrt(shape(_POSITIONS, 2)[0] - 1)
    in_layer = re.compile(re.escape(f"{prefix}{CLIP_LAYERS}.") + r"(\d+)\.")
    numbers = [int(found[1]) for name in tensors if (found := in_layer.match(name))]
    values = {
        "hidden_size": hidden,
        "intermediate_size": shape(_FC1, 2)[0],
        "num_hidden_layers": max(numbers) + 1,
        "num_attention_heads": max(hidden // CLIP_VIT_HEAD_DIM, 1),
        "image_size": side * patch,
        "patch_size": patch,
    }
    note(
        f"no configuration of the vision tower: assuming an OpenAI CLIP ViT with {values['num_attention_heads']} heads "
        f"of {CLIP_VIT_HEAD_DIM}, quick_gelu and eps 1e-5, for images of {side * patch} pixels "
        "(--vision-tower DIR names one)"
    )
    return values
