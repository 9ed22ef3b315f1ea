"""Writes checkpoint directories in the published original layout: config.json and model.safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file

from dpn_rt.builders.hr_tower import FAMILIES
from dpn_rt.builders.names import original_names, published_modules, tower_modules, weight_names
from dpn_rt.errors import ConfigError
from dpn_rt.format.weight_spec import weight_spec
from dpn_rt.model.reduction.pooling_config import PoolingConfig
from dpn_rt.model.vision.anyres.config import AnyresConfig
from dpn_rt.model.vision.hr.config import HrConfig
from dpn_rt.reference import hf_modules
from dpn_rt.reference.boundary import Boundary
from dpn_rt.reference.hr import HrTower

if TYPE_CHECKING:
    from dpn_rt.reference.modules import EagerModules

TOWER_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "layer_norm_eps",
    "hidden_act",
)
HR_PREFIX = "model.vision_tower."
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."


def write_checkpoint(model: EagerModules, path: Path, extra_files: Iterable[Path] = ()) -> None:
    """Write `model` to the directory `path`, which is made if missing.

    Each file is written under a temporary name and then renamed, so that it is complete or absent.

    Args:
        model: to write.
        path: the directory.
        extra_files: are copied to the directory.

    Raises:
        ConfigError: see `original_config`.
        OSError: the directory cannot be written.
    """
    config = original_config(model)
    path.mkdir(parents=True, exist_ok=True)
    for file in extra_files:
        shutil.copy2(file, path / file.name)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in original_weights(model)}
    temporary = path / ".model.safetensors.part"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(path / "model.safetensors")
    temporary = path / ".config.json.part"
    temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path / "config.json")


def original_weights(model: EagerModules) -> Iterator[tuple[str, torch.Tensor]]:
    """(published name, tensor) of every parameter of `model`."""
    projector = model.config.projector
    names = original_names("linear" if projector is None else projector.type)
    vision = model.config.vision
    prefix = HR_PREFIX if isinstance(vision, HrConfig) else TOWER_PREFIX
    tower = {} if vision is None else tower_modules(vision, prefix)
    published = weight_names(weight_spec(model.config), published_modules(model.config, names, tower))
    renamed = {
        own: theirs
        for canonical, parameters in model.name_map().items()
        for own, theirs in zip(parameters, published[canonical], strict=True)
    }
    renamed |= _unused_names(model)
    for name, tensor in model.named_parameters():
        yield renamed[name], _with_class_row(tensor) if _is_hr_grid(model, name) else tensor


def _unused_names(model: EagerModules) -> dict[str, str]:
    """Own and published names of the tower's weights that no engine has, since they do not run."""
    if isinstance(model.vision, HrTower):
        names = model.vision.published_names().items()
        unused = ("class_embedding", "post_layernorm.weight", "post_layernorm.bias")
        return {f"vision.{own}": HR_PREFIX + published for own, published in names if own.endswith(unused)}
    if model.vision is None:
        return {}
    prefix = f"vision.{hf_modules.clip_prefix(model.vision)}"
    norm = ("post_layernorm.weight", "post_layernorm.bias")
    return {prefix + name: TOWER_PREFIX + name for name in norm}


def _is_hr_grid(model: EagerModules, name: str) -> bool:
    return isinstance(model.vision, HrTower) and name.endswith("position_embedding.weight")


def _with_class_row(positions: torch.Tensor) -> torch.Tensor:
    """Published position embeddings begin with the class token's, which LLaVA-HR does not use."""
    return torch.cat((positions.new_zeros(1, positions.shape[1]), positions))


def original_config(model: EagerModules) -> dict[str, Any]:
    """The content of config.json in the published layout.

    The tower ends at the layer that is used, so `mm_vision_select_layer` is -1. The published layout keeps the tower's
    configuration in the directory that `mm_vision_tower` names; here it is in `vision_config`.

    Raises:
        ConfigError: only one of qkv and o has biases, or heads are normed, or layers have sliding windows: LLaMA's
            config.json cannot express these.
    """
    config = model.config
    decoder, prompt = config.decoder, config.prompt
    if decoder.qk_norm or decoder.windows:
        what = "normed heads" if decoder.qk_norm else "sliding windows"
        raise ConfigError(f"the decoder has {what}: the original layout is LLaMA's, which has none")
    if decoder.qkv_bias != decoder.o_bias:
        raise ConfigError(f"qkv_bias {decoder.qkv_bias}, o_bias {decoder.o_bias}: expected both or none in config.json")
    result: dict[str, Any] = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": decoder.rope.theta,
        "rope_scaling": json.loads(decoder.rope.scaling_json) if decoder.rope.scaling_json else None,
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.tie_word_embeddings,
        "attention_bias": decoder.qkv_bias,
        "torch_dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        "bos_token_id": prompt.bos_token_id,
        "eos_token_id": list(prompt.eos_token_ids) if len(prompt.eos_token_ids) != 1 else prompt.eos_token_ids[0],
        "image_aspect_ratio": "pad" if prompt.image_aspect_ratio == "pad" else "square",
    }
    if prompt.router_token_id is not None:
        result["router_token_id"] = prompt.router_token_id
    if config.projector is not None:
        result |= {"mm_projector_type": config.projector.type, "mm_hidden_size": config.projector.input_size}
    if isinstance(config.vision, HrConfig):
        result |= _hr_config(config.vision)
    elif config.vision is not None and not isinstance(config.vision, AnyresConfig):
        tower = hf_modules.clip_config(config.vision).to_dict()
        result |= {
            "mm_vision_tower": "vision_config",
            "mm_vision_select_layer": -1,
            "mm_vision_select_feature": config.vision.select_feature,
            "vision_config": {key: tower[key] for key in TOWER_KEYS},
        }
    if isinstance(config.reduction, PoolingConfig):
        result["pooling"] = _pooling(model, config.reduction)
    return result


def _hr_config(vision: HrConfig) -> dict[str, Any]:
    """LLaVA-HR's keys. The fast path's position embeddings are written for its own grid."""
    tower = hf_modules.clip_config(vision.fast).to_dict()
    is_large = vision.slow.layer_norm_eps == FAMILIES["convnext_large"].layer_norm_eps
    return {
        "is_multipath_encoder": True,
        "vision_tower_slow": "convnext_large" if is_large else "convnext_xxlarge",
        "input_image_size": vision.image_size,
        "freeze_vision": not vision.has_adapters,
        "mm_vision_tower": "vision_config",
        "vision_config": {key: tower[key] for key in TOWER_KEYS},
    }


def _pooling(model: EagerModules, pooling: PoolingConfig) -> dict[str, Any]:
    layers = []
    for boundary in pooling.boundaries:
        kernels: Any = [list(kernel) for kernel in boundary.kernels]
        kernels = kernels[0] if pooling.pooling_type == "static" else kernels
        layers.append({"index": boundary.layer, "kernel_size": kernels, "stride": kernels})
    return {
        "pooling_type": pooling.pooling_type,
        "pooling_layers": layers,
        "pooling_function": pooling.pooling_function,
        "pooling_location": "post",
        "prepooling": isinstance(model.config.vision, HrConfig) and model.config.vision.prepools,
        "use_special_token": pooling.use_router_token,
        "detach_cls_token_to_predict": any(cast(Boundary, b).detach_router_input for b in model.boundaries),
        "router_version": pooling.router_version,
    }
