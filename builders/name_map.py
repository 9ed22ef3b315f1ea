"""Which published weights make up each canonical weight, in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dpn_rt.builders.checkpoint import Checkpoint
from dpn_rt.builders.vision_tower import VisionTower
from dpn_rt.format.config import ModelConfig
from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.reduction.pooling_config import PoolingConfig


@dataclass(frozen=True, slots=True)
class LayoutNames:
    """How a layout spells what is not inside a decoder layer."""

    decoder: str
    """Prefix of `embed_tokens`, `layers` and `norm`."""
    lm_head: str
    projector: tuple[str, ...]
    """Names of the projector's linear layers, without `.weight`."""
    projector_prefix: str
    projector_bias: bool = True


@dataclass(frozen=True, slots=True)
class Part:
    """One published tensor and the shape that it must have."""

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightSource:
    """How a canonical weight is made.

    "rows": the parts below each other, each flattened to two dimensions if it has more.
    "taps": one depthwise convolution `[H, 1, kh, kw]` becomes `[kh * kw, H]`.
    No parts: zeros.
    """

    parts: tuple[Part, ...]
    assembly: Literal["rows", "taps"] = "rows"


Sources = Iterator[tuple[str, WeightSource]]


def weight_sources(
    model: ModelConfig, checkpoint: Checkpoint, names: LayoutNames, tower: VisionTower | None
) -> dict[str, WeightSource]:
    """The source of every canonical weight of `model`, in no particular order."""
    sources = dict(_decoder(model.decoder, checkpoint, names))
    if isinstance(model.reduction, PoolingConfig):
        for index, boundary in enumerate(model.reduction.boundaries):
            prefix = f"{names.decoder}layers.{boundary.layer}."
            sources |= dict(_boundary(model.reduction, index, model.decoder.hidden_size, checkpoint, prefix))
    if model.projector is not None:
        sources |= dict(_projector(model, checkpoint, names))
    if model.vision is not None and tower is not None:
        sources |= dict(_vision(tower))
    return sources


def _decoder(config: DecoderConfig, checkpoint: Checkpoint, names: LayoutNames) -> Sources:
    hidden, inter = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def source(*parts: tuple[str, tuple[int, ...]]) -> WeightSource:
        return WeightSource(tuple(Part(checkpoint, names.decoder + name, shape) for name, shape in parts))

    yield "embed_tokens.weight", source(("embed_tokens.weight", (config.vocab_size, hidden)))
    for layer in range(config.num_layers):
        to, attention, mlp = f"layers.{layer}", f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        rows = (("q_proj", query), ("k_proj", key), ("v_proj", key))
        yield f"{to}.input_norm.weight", source((f"{to}.input_layernorm.weight", (hidden,)))
        yield f"{to}.qkv.weight", source(*((f"{attention}.{name}.weight", (size, hidden)) for name, size in rows))
        yield f"{to}.o.weight", source((f"{attention}.o_proj.weight", (hidden, query)))
        if config.qkv_bias:
            yield f"{to}.qkv.bias", source(*((f"{attention}.{name}.bias", (size,)) for name, size in rows))
        if config.o_bias:
            yield f"{to}.o.bias", source((f"{attention}.o_proj.bias", (hidden,)))
        yield f"{to}.post_norm.weight", source((f"{to}.post_attention_layernorm.weight", (hidden,)))
        gate_up = ((f"{mlp}.{name}.weight", (inter, hidden)) for name in ("gate_proj", "up_proj"))
        yield f"{to}.gate_up.weight", source(*gate_up)
        yield f"{to}.down.weight", source((f"{mlp}.down_proj.weight", (hidden, inter)))
    yield "norm.weight", source(("norm.weight", (hidden,)))
    if not config.tie_word_embeddings:
        yield "lm_head.weight", WeightSource((Part(checkpoint, names.lm_head, (config.vocab_size, hidden)),))


def _boundary(pyramid: PoolingConfig, index: int, hidden: int, checkpoint: Checkpoint, prefix: str) -> Sources:
    kernels = pyramid.boundaries[index].kernels
    router = {
        "norm.weight": ("mlp1.0.weight", (hidden,)),
        "norm.bias": ("mlp1.0.bias", (hidden,)),
        "hidden.weight": ("mlp1.1.weight", (hidden // 4, hidden)),
        "predictor.weight": ("predictor.weight", (len(kernels), hidden // 4)),
    }
    if pyramid.router_version == "v2":
        router = {"predictor.weight": ("predictor.weight", (len(kernels), hidden))}
    if pyramid.pooling_type == "adaptive":
        for canonical, (name, shape) in router.items():
            part = Part(checkpoint, f"{prefix}pooling_router.{name}", shape)
            yield f"boundaries.{index}.router.{canonical}", WeightSource((part,))
    if pyramid.pooling_function == "conv":
        for expert, kernel in enumerate(kernels):
            part = Part(checkpoint, f"{prefix}experts.{expert}.weight", (hidden, 1, *kernel))
            yield f"boundaries.{index}.experts.{expert}.weight", WeightSource((part,), "taps")


def _projector(model: ModelConfig, checkpoint: Checkpoint, names: LayoutNames) -> Sources:
    assert model.projector is not None
    hidden, columns = model.decoder.hidden_size, model.projector.input_size
    for position, name in zip((0, 2), names.projector, strict=False):  # a linear projector has the first only
        yield f"projector.{position}.weight", WeightSource((Part(checkpoint, f"{name}.weight", (hidden, columns)),))
        bias = (Part(checkpoint, f"{name}.bias", (hidden,)),) if names.projector_bias else ()
        yield f"projector.{position}.bias", WeightSource(bias)
        columns = hidden


def _vision(tower: VisionTower) -> Sources:
    config = tower.config
    hidden, inter, patch = config.hidden_size, config.intermediate_size, config.patch_size
    num_positions = config.grid[0] * config.grid[1] + 1

    def source(*parts: tuple[str, tuple[int, ...]]) -> WeightSource:
        return WeightSource(tuple(Part(tower.checkpoint, tower.prefix + name, shape) for name, shape in parts))

    def affine(canonical: str, shape: tuple[int, ...], *published: str) -> Sources:
        yield f"vision.{canonical}.weight", source(*((f"{name}.weight", shape) for name in published))
        yield f"vision.{canonical}.bias", source(*((f"{name}.bias", shape[:1]) for name in published))

    positions = ("embeddings.position_embedding.weight", (num_positions, hidden))
    yield "vision.class_embedding", source(("embeddings.class_embedding", (hidden,)))
    yield "vision.patch_embedding.weight", source(("embeddings.patch_embedding.weight", (hidden, 3, patch, patch)))
    yield "vision.position_embedding.weight", source(positions)
    yield from affine("pre_norm", (hidden,), "pre_layrnorm")  # CLIP's own spelling
    for layer in range(config.num_layers):
        to, published = f"layers.{layer}", f"encoder.layers.{layer}"
        heads = [f"{published}.self_attn.{name}_proj" for name in "qkv"]
        yield from affine(f"{to}.norm1", (hidden,), f"{published}.layer_norm1")
        yield from affine(f"{to}.qkv", (hidden, hidden), *heads)
        yield from affine(f"{to}.out", (hidden, hidden), f"{published}.self_attn.out_proj")
        yield from affine(f"{to}.norm2", (hidden,), f"{published}.layer_norm2")
        yield from affine(f"{to}.fc1", (inter, hidden), f"{published}.mlp.fc1")
        yield from affine(f"{to}.fc2", (hidden, inter), f"{published}.mlp.fc2")
