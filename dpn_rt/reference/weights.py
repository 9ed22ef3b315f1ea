"""Canonical weight names (as in an engine directory) and the eager model's parameters, in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import nn

from dpn_rt.errors import CheckpointError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.weight_spec import weight_spec
from dpn_rt.model.reduction.pooling_config import PoolingConfig

_DECODER_PARTS = {
    "input_norm.weight": ("input_layernorm.weight",),
    "post_norm.weight": ("post_attention_layernorm.weight",),
    "qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "o.weight": ("self_attn.o_proj.weight",),
    "gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down.weight": ("mlp.down_proj.weight",),
}
_QKV_BIAS = {"qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")}
_O_BIAS = {"o.bias": ("self_attn.o_proj.bias",)}
_VISION_PARTS = {
    "norm1": ("layer_norm1",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.out_proj",),
    "norm2": ("layer_norm2",),
    "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
}
_VISION_EMBEDDINGS = {
    "class_embedding": "embeddings.class_embedding",
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "position_embedding.weight": "embeddings.position_embedding.weight",
    "pre_norm.weight": "pre_layrnorm.weight",
    "pre_norm.bias": "pre_layrnorm.bias",
}

NameMap = dict[str, tuple[str, ...]]
"""Canonical name -> parameters of the eager model whose rows, one after the other, it holds."""


def decoder_map(config: ModelConfig, prefix: str = "language_model.", head: str = "lm_head.weight") -> NameMap:
    """Weights of a transformers LlamaModel at `prefix` and of the output layer."""
    decoder = config.decoder
    names: NameMap = {
        "embed_tokens.weight": (f"{prefix}embed_tokens.weight",),
        "norm.weight": (f"{prefix}norm.weight",),
    }
    parts = _DECODER_PARTS | (_QKV_BIAS if decoder.qkv_bias else {}) | (_O_BIAS if decoder.o_bias else {})
    for layer in range(decoder.num_layers):
        for name, sources in parts.items():
            names[f"layers.{layer}.{name}"] = tuple(f"{prefix}layers.{layer}.{source}" for source in sources)
    if not decoder.tie_word_embeddings:
        names["lm_head.weight"] = (head,)
    return names


def vision_map(config: ModelConfig, prefix: str) -> NameMap:
    """Weights of the CLIP tower whose `embeddings` module is at `prefix`."""
    if config.vision is None:
        return {}
    names: NameMap = {f"vision.{name}": (prefix + source,) for name, source in _VISION_EMBEDDINGS.items()}
    for layer in range(config.vision.num_layers):
        for name, sources in _VISION_PARTS.items():
            for kind in ("weight", "bias"):
                full = tuple(f"{prefix}encoder.layers.{layer}.{source}.{kind}" for source in sources)
                names[f"vision.layers.{layer}.{name}.{kind}"] = full
    return names


def boundary_map(config: ModelConfig) -> NameMap:
    """Weights of routers and convolution experts; the names are the same on both sides."""
    pooling, names = config.reduction, []
    if not isinstance(pooling, PoolingConfig):
        return {}
    for b, boundary in enumerate(pooling.boundaries):
        if pooling.pooling_type == "adaptive":
            names.append(f"boundaries.{b}.router.predictor.weight")
            if pooling.router_version == "v1":
                names += [f"boundaries.{b}.router.{part}" for part in ("norm.weight", "norm.bias", "hidden.weight")]
        if pooling.pooling_function == "conv":
            names += [f"boundaries.{b}.experts.{e}.weight" for e in range(boundary.num_experts)]
    return {name: (name,) for name in names}


def projector_map(config: ModelConfig) -> NameMap:
    """Weights of the projector; the names are the same on both sides."""
    if config.projector is None:
        return {}
    layers = ("0",) if config.projector.type == "linear" else ("0", "2")
    names = [f"projector.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    return {name: (name,) for name in names}


def load_canonical(model: nn.Module, names: NameMap, weights: Iterable[tuple[str, torch.Tensor]], copy: bool) -> None:
    """Put canonical weights into `model`; unused ones are an error, and missing ones are reported together.

    Args:
        model: may be on the meta device.
        names: what to take from where.
        weights: canonical (name, tensor) pairs.
        copy: False lets the parameters share the tensors' memory where the layout allows it.

    Raises:
        CheckpointError: weights missing, unknown, or of the wrong shape; the message names them all.
    """
    problems, seen = [], set()
    for name, tensor in weights:
        seen.add(name)
        if name not in names:
            problems.append(f"{name} is not a weight of this model")
            continue
        parts = [model.get_parameter(part) for part in names[name]]
        if list(tensor.shape) != _canonical_shape(parts):
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {_canonical_shape(parts)}")
            continue
        if len(parts) == 1:
            _assign(model, names[name][0], _to_parameter_shape(tensor, parts[0]), copy)
            continue
        for part, rows in zip(names[name], torch.split(tensor, [part.shape[0] for part in parts]), strict=True):
            _assign(model, part, rows, copy)
    problems += [f"{name} is missing" for name in names if name not in seen]
    if problems:
        raise CheckpointError("weights do not fit the model:\n  " + "\n  ".join(problems))


def canonical_weights(model: nn.Module, names: NameMap, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical (name, tensor) pairs of `model`, fused, in an engine's order and dtypes, one at a time."""
    for name, spec in weight_spec(config).items():
        parts = [model.get_parameter(source).detach() for source in names[name]]
        tensor = torch.cat(parts) if len(parts) > 1 else _to_canonical_shape(parts[0])
        yield name, tensor.to(spec.dtype).contiguous()


def _is_expert(parameter: torch.Tensor) -> bool:
    return parameter.dim() == 4 and parameter.shape[1] == 1


def _to_canonical_shape(parameter: torch.Tensor) -> torch.Tensor:
    if _is_expert(parameter):  # [H, 1, kh, kw] -> [kh * kw, H]
        return parameter.flatten(1).t()
    return parameter.flatten(1) if parameter.dim() == 4 else parameter


def _to_parameter_shape(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if _is_expert(parameter):
        tensor = tensor.t().contiguous()
    return tensor.reshape(parameter.shape)


def _canonical_shape(parts: list[nn.Parameter]) -> list[int]:
    shape = list(_to_canonical_shape(parts[0]).shape)
    return shape if len(parts) == 1 else [sum(part.shape[0] for part in parts), *shape[1:]]


def _assign(model: nn.Module, path: str, value: torch.Tensor, copy: bool) -> None:
    module_path, _, name = path.rpartition(".")
    module = model.get_submodule(module_path)
    old = cast(nn.Parameter, getattr(module, name))
    value = value.to(old.dtype)
    setattr(module, name, nn.Parameter(value.clone() if copy else value, requires_grad=old.requires_grad))
