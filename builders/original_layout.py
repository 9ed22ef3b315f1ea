"""The layout of the original LLaVA code and of DPN: LLaMA's config.json with `mm_*` keys and a `pooling` object."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

from dpn_rt.builders.anyres_config import original_anyres_config
from dpn_rt.builders.checkpoint import Checkpoint
from dpn_rt.builders.decoder_config import decoder_config
from dpn_rt.builders.decoder_families import LLAMA, ORIGINAL_FAMILIES, Family
from dpn_rt.builders.hr_tower import find_hr_tower, is_hr
from dpn_rt.builders.json_values import Json, choice_of, model_type_of, object_of, value_of
from dpn_rt.builders.layout import Layout, Note, has_own_head, projector_config
from dpn_rt.builders.names import ORIGINAL_PROJECTORS, original_names
from dpn_rt.builders.pooling_config import prepooling, reduction_config
from dpn_rt.builders.vision_tower import VisionTower, find_tower
from dpn_rt.errors import CheckpointError, ConfigError
from dpn_rt.format.config import AspectRatio
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.projector import ProjectorType
from dpn_rt.schema.files import is_directory

_IN_TILES = "anyres"
_ASPECT_RATIOS: dict[str, AspectRatio] = {"pad": "pad", "square": "processor", _IN_TILES: "processor"}


def read_original(checkpoint: Checkpoint, config: Json, tower_directory: Path | None, note: Note) -> Layout:
    """The model of a checkpoint in the original layout.

    Raises:
        CheckpointError, ConfigError: see `find_tower`, `decoder_config` and `reduction_config`.
    """
    family = _family(config)
    tower = _tower(checkpoint, config, tower_directory, note)
    kind = cast(ProjectorType, _projector_type(checkpoint, config, tower))
    names = original_names(kind)
    _check_tower_width(config, tower)
    if tower is None and config.get("mm_vision_tower"):
        note(
            f"no weights of the vision tower ({config['mm_vision_tower']}): the engine takes image embeddings only "
            "(--vision-tower DIR names a tower)"
        )
    tied = value_of(config, "tie_word_embeddings", bool, False) and not has_own_head(checkpoint, names, True, note)
    router = config.get("router_token_id")
    return Layout(
        kind="original",
        names=names,
        decoder=decoder_config(config, family, tie_word_embeddings=tied, sizes_may_be_absent=False),
        reduction=reduction_config(config, may_prepool=is_hr(config)),
        tower=tower,
        projector=projector_config(kind, names, checkpoint.tensors, tower),
        image_aspect_ratio=_aspect_ratio(config),
        token_values=(config,),
        token_defaults={},
        has_own_template=family is not LLAMA,
        image_token_id=None,
        router_token_id=None if router is None else value_of(config, "router_token_id", int),
    )


def _tower(checkpoint: Checkpoint, config: Json, directory: Path | None, note: Note) -> VisionTower | None:
    """The vision tower; `directory` is one that the user named."""
    if is_hr(config):
        if directory is not None:
            raise CheckpointError(
                f"--vision-tower {directory}: a LLaVA-HR checkpoint holds its own tower, expected no directory"
            )
        return find_hr_tower(checkpoint, config, prepools=prepooling(config), note=note)
    feature = choice_of(config, "mm_vision_select_feature", ("patch", "cls_patch"), "patch")
    select_layer = value_of(config, "mm_vision_select_layer", int, -2)
    directory = directory or _local_tower(checkpoint.path, config)
    tower = find_tower(checkpoint, object_of(config, "vision_config"), directory, select_layer, feature, note)
    if tower is None or config.get("image_aspect_ratio") != _IN_TILES:
        return tower
    return replace(tower, config=original_anyres_config(config, cast(ClipConfig, tower.config)))


def _family(config: Json) -> Family:
    """Of the decoder, by the name that the original code gives to the whole model."""
    model_type = value_of(config, "model_type", str, "llava_llama")
    is_llama = "llama" in model_type  # DPN's and others' names for the same model
    family = LLAMA if is_llama else ORIGINAL_FAMILIES[model_type_of(config, tuple(ORIGINAL_FAMILIES))]
    if value_of(config, "mm_use_im_start_end", bool, False):
        raise ConfigError(
            "config.json: mm_use_im_start_end is not supported: images stand between no tokens of their own"
        )
    return family


def _local_tower(path: Path, config: Json) -> Path | None:
    """The directory that `mm_vision_tower` names, absolute or inside the checkpoint; None if there is none."""
    name = value_of(config, "mm_vision_tower", str, "")
    directory = path / name  # an absolute name replaces the path
    return directory if name and is_directory(directory) else None


def _projector_type(checkpoint: Checkpoint, config: Json, tower: VisionTower | None) -> str:
    """The projector type in config.json. It is not read where there is neither a tower nor a projector."""
    default = "linear"  # LLaVA's default
    prefix = original_names(default).projector_prefix
    if tower is None and not any(name.startswith(prefix) for name in checkpoint.tensors):
        return default
    return choice_of(config, "mm_projector_type", tuple(ORIGINAL_PROJECTORS), default)


def _check_tower_width(config: Json, tower: VisionTower | None) -> None:
    if tower is None or config.get("mm_hidden_size") is None:
        return
    width = value_of(config, "mm_hidden_size", int)
    if width != tower.config.hidden_size:
        raise ConfigError(
            f"config.json: mm_hidden_size is {width}, the vision tower's hidden size {tower.config.hidden_size}"
        )


def _aspect_ratio(config: Json) -> AspectRatio:
    return _ASPECT_RATIOS[choice_of(config, "image_aspect_ratio", tuple(_ASPECT_RATIOS), "square")]
