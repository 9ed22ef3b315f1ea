"""The Hugging Face LLaVA layout: `text_config` and `vision_config`, weights as transformers 4 or 5 spells them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from dpn_rt.builders.anyres_config import next_config, onevision_config
from dpn_rt.builders.checkpoint import Checkpoint
from dpn_rt.builders.decoder_config import decoder_config
from dpn_rt.builders.decoder_families import FAMILIES
from dpn_rt.builders.json_values import Json, Section, choice_of, model_type_of, object_of, value_of
from dpn_rt.builders.layout import Layout, Note, has_own_head, most_common_prefix, projector_config
from dpn_rt.builders.names import HUGGINGFACE_PROJECTOR, LLAMA_ROOTS, LayoutNames
from dpn_rt.builders.pooling_config import reduction_config
from dpn_rt.builders.vision_tower import find_tower
from dpn_rt.errors import ConfigError
from dpn_rt.model.vision.anyres.config import AnyresConfig
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.siglip.config import SiglipConfig

# Oldest first: transformers 4, transformers 5 (in memory), and a nesting that some converters write.
_DECODERS = ("language_model.model.", "model.language_model.", "model.language_model.model.")
_PROJECTORS = ("multi_modal_projector.", "model.multi_modal_projector.")
_NEWLINES = ("image_newline", "model.image_newline")
_HEADS = ("language_model.lm_head", "lm_head", "model.language_model.lm_head")

# The vision tower of transformers' LlavaConfig without a vision_config: CLIP ViT-L/14 at 336.
_DEFAULT_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_ONEVISION_TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


@dataclass(frozen=True)
class ModelKind:
    """A `model_type` of transformers, and what its configuration takes for keys that are left out."""

    in_tiles: Callable[[Json, ClipConfig], AnyresConfig] | None = None
    """How images are made tiles; None: they are not."""
    tower: Json = field(default_factory=lambda: _DEFAULT_TOWER)
    family: str = "llama"
    select_layer: int = -2
    select_feature: str = "default"


MODEL_KINDS = {
    "llava": ModelKind(),
    "llava_next": ModelKind(next_config),
    "llava_onevision": ModelKind(onevision_config, _ONEVISION_TOWER, "qwen2", -1, "full"),
}


def read_huggingface(checkpoint: Checkpoint, config: Json, tower_directory: Path | None, note: Note) -> Layout:
    """The model of a checkpoint in the Hugging Face layout.

    Raises:
        CheckpointError, ConfigError: see `find_tower`, `decoder_config` and `reduction_config`.
    """
    kind = MODEL_KINDS[model_type_of(config, tuple(MODEL_KINDS), "llava")]
    choice_of(config, "projector_hidden_act", ("gelu",), "gelu")
    text = object_of(config, "text_config") or Section({}, "config.json: text_config.")
    family = FAMILIES[model_type_of(text, tuple(FAMILIES), kind.family)]
    names = _names(checkpoint, value_of(config, "multimodal_projector_bias", bool, True))
    strategy = choice_of(config, "vision_feature_select_strategy", ("default", "full"), kind.select_feature)
    feature = "patch" if strategy == "default" else "cls_patch"
    given = object_of(config, "vision_config")
    tower_values = Section({"model_type": kind.tower["model_type"], **given}, given.place) if given else kind.tower
    select_layer = _select_layer(config, kind.select_layer)
    tower = find_tower(checkpoint, tower_values, tower_directory, select_layer, feature, note)
    if tower is not None and strategy == "default" and isinstance(tower.config, SiglipConfig):
        raise ConfigError(
            "config.json: vision_feature_select_strategy: default would leave out the first patch of a SigLIP tower, "
            "which has no class token: expected full"
        )
    if tower is not None and kind.in_tiles is not None:
        tower = replace(tower, config=kind.in_tiles(config, cast(ClipConfig, tower.config)))
    if tower is None:
        note("no weights of a vision tower: the engine takes image embeddings only (--vision-tower DIR names a tower)")
    tie_flags = {value_of(values, "tie_word_embeddings", bool, False) for values in (config, text)}
    # transformers 4 reads the text model's flag, transformers 5 either flag. Where these differ, the weights decide.
    tied = True in tie_flags and not has_own_head(checkpoint, names, tie_flags == {True}, note)
    pooled = config if config.get("pooling") is not None else text
    return Layout(
        kind="huggingface",
        names=names,
        decoder=decoder_config(text, family, tie_word_embeddings=tied, sizes_may_be_absent=True),
        reduction=reduction_config(pooled),
        tower=tower,
        projector=projector_config("mlp2x_gelu", names, checkpoint.tensors, tower),
        image_aspect_ratio="processor",
        token_values=(config, text),
        token_defaults={key: value for key, value in family.defaults.items() if key not in text},
        has_own_template=True,
        image_token_id=_token_id(config, ("image_token_id", "image_token_index")),
        router_token_id=_token_id(config, ("router_token_id",)),
    )


def _names(checkpoint: Checkpoint, projector_bias: bool) -> LayoutNames:
    decoder = most_common_prefix(checkpoint.tensors, _DECODERS, tuple(f"{root}." for root in LLAMA_ROOTS))
    projector = most_common_prefix(checkpoint.tensors, _PROJECTORS, HUGGINGFACE_PROJECTOR)
    spelled = _HEADS[0] if decoder == _DECODERS[0] else _HEADS[1]
    head = next((name for name in _HEADS if f"{name}.weight" in checkpoint.tensors), spelled)
    linears = tuple(projector + name for name in HUGGINGFACE_PROJECTOR)
    newline = next((name for name in _NEWLINES if name in checkpoint.tensors), _NEWLINES[0])
    return LayoutNames(decoder, head, linears, projector, projector_bias, newline)


def _select_layer(config: Json, default: int) -> int:
    value: Any = config.get("vision_feature_layer")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise ConfigError(
            f"config.json: vision_feature_layer: features of several layers are not supported, got {value}"
        )
    return value_of({"vision_feature_layer": value}, "vision_feature_layer", int, default)


def _token_id(config: Json, keys: tuple[str, ...]) -> int | None:
    key = next((key for key in keys if config.get(key) is not None), None)
    return None if key is None else value_of(config, key, int)
