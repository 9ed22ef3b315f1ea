"""The configuration of a CLIP or SigLIP vision tower, from its JSON values or from the shapes of its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from dpn_rt.builders.json_values import Json, choice_of, model_type_of, name_of, square_side, value_of
from dpn_rt.builders.names import CLIP_LAYERS, clip_weight
from dpn_rt.builders.shards import TensorInfo
from dpn_rt.errors import CheckpointError, ConfigError
from dpn_rt.model.vision.clip import names as clip
from dpn_rt.model.vision.clip.config import ClipConfig, SelectFeature
from dpn_rt.model.vision.siglip.config import SiglipConfig
from dpn_rt.schema.activation import Activation
from dpn_rt.schema.bounds import bounded

CLIP_VIT_HEAD_DIM = 64
"""Head size of all of OpenAI's CLIP ViTs; used only where no configuration has the number of heads."""


@dataclass(frozen=True)
class TowerKind:
    """A `model_type` of towers, and what transformers takes for keys that its configuration leaves out."""

    config: type[ClipConfig]
    patch_size: int
    layer_norm_eps: float
    activation: str
    has_class_row: bool


TOWER_KINDS = {
    "clip_vision_model": TowerKind(ClipConfig, 32, 1e-5, "quick_gelu", has_class_row=True),
    "siglip_vision_model": TowerKind(SiglipConfig, 16, 1e-6, "gelu_pytorch_tanh", has_class_row=False),
}
ACTIVATIONS: Mapping[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""transformers' names -> ours."""


def clip_config(values: Json, select_layer: int, select_feature: str) -> ClipConfig:
    """The tower up to the layer whose hidden state is used.

    Args:
        values: CLIP's or SigLIP's configuration.
        select_layer: index into the hidden states of all layers, the embeddings first; may be negative.
        select_feature: "patch" or "cls_patch"; the same for a tower without a class row.

    Raises:
        ConfigError: a value has the wrong type, or asks for something that the runtime does not support.
    """
    kind = TOWER_KINDS[model_type_of(values, tuple(TOWER_KINDS), "clip_vision_model")]
    if value_of(values, "num_channels", int, 3) != 3:
        raise ConfigError(f"{name_of(values, 'num_channels')}: expected 3, got {values['num_channels']}")
    num_layers = value_of(values, "num_hidden_layers", int, 12)
    if not -num_layers - 1 <= select_layer <= num_layers:
        raise ConfigError(
            f"config.json: vision select layer {select_layer} does not exist: a tower of {num_layers} layers has "
            f"hidden states {-num_layers - 1} to {num_layers}"
        )
    config = kind.config(
        hidden_size=value_of(values, "hidden_size", int, 768),
        intermediate_size=value_of(values, "intermediate_size", int, 3072),
        num_layers=select_layer if select_layer >= 0 else num_layers + 1 + select_layer,
        num_heads=value_of(values, "num_attention_heads", int, 12),
        image_size=square_side(values, "image_size", 224),
        patch_size=square_side(values, "patch_size", kind.patch_size),
        layer_norm_eps=value_of(values, "layer_norm_eps", float, kind.layer_norm_eps),
        activation=ACTIVATIONS[choice_of(values, "hidden_act", tuple(ACTIVATIONS), kind.activation)],
        select_feature=cast(SelectFeature, select_feature) if kind.has_class_row else "patch",
    )
    return bounded(config, "vision ")


def clip_values_from_shapes(tensors: Mapping[str, TensorInfo], prefix: str, note: Callable[[str], None]) -> Json:
    """CLIP's configuration from the shapes of weights. Other values are those that all of OpenAI's CLIP ViTs share.

    Raises:
        CheckpointError: a weight that is needed for a size is missing or has the wrong number of dimensions.
    """

    def shape(module: str, rank: int) -> tuple[int, ...]:
        name = clip_weight(f"{module}.weight")
        info = tensors.get(prefix + name)
        if info is None or len(info.shape) != rank:
            found = "missing" if info is None else f"of shape {list(info.shape)}"
            raise CheckpointError(
                f"vision tower: {prefix}{name} is {found}, so the tower's configuration cannot be told; "
                "name its directory with --vision-tower"
            )
        return info.shape

    hidden, _, patch, _ = shape(clip.PATCH_EMBEDDING, 4)
    side = math.isqrt(max(shape(clip.POSITION_EMBEDDING, 2)[0] - 1, 0))
    in_layer = re.compile(re.escape(f"{prefix}{CLIP_LAYERS}.") + r"(\d{1,6})\.")
    numbers = [int(found[1]) for name in tensors if (found := in_layer.match(name))]
    values = {
        "hidden_size": hidden,
        "intermediate_size": shape(clip.layer_module(0, clip.FC1), 2)[0],
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
