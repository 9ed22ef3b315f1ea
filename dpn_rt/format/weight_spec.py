"""The frozen list of an engine's weights: canonical name, shape and dtype of each, in file order.

Weights of linear layers are `[out, in]`. Builders write exactly this list and the runtime reads exactly this list.
"""

from __future__ import annotations

import math

import torch

from dpn_rt.format.config import ModelConfig
from dpn_rt.model.config import DecoderConfig, ProjectorConfig
from dpn_rt.model.vision.clip import ClipConfig
from dpn_rt.schema.weights import TORCH_DTYPES, NamedSpecs, WeightSpec

TENSOR_ALIGNMENT = 64
"""Bytes: one cache line, and the widest vector that a kernel loads."""


def weight_spec(model: ModelConfig) -> dict[str, WeightSpec]:
    """Every weight of an engine of `model`, by canonical name, in the order in which the file holds them.

    The file format allows no gaps between tensors, so alignment comes from the order: tensors whose size is a multiple
    of 64 bytes first (for a real model that is nearly all of them), then the rest by falling power of two. Each tensor
    thus starts at a multiple of 64 bytes, or at least of the largest power of two that divides its own size.
    """
    dtype = TORCH_DTYPES[model.dtype]
    named = [*_decoder(model.decoder, dtype), *model.reduction.weight_specs(model.decoder.hidden_size, dtype)]
    if model.projector is not None:
        named += _projector(model.projector, model.decoder.hidden_size, dtype)
    if model.vision is not None:
        named += _vision(model.vision, dtype)
    named.sort(key=lambda item: -_size_alignment(item[1].num_bytes))  # stable: equal alignment keeps the model's order
    return dict(named)


def _size_alignment(num_bytes: int) -> int:
    return math.gcd(num_bytes, TENSOR_ALIGNMENT)


def _decoder(config: DecoderConfig, dtype: torch.dtype) -> NamedSpecs:
    hidden, inter = config.hidden_size, config.intermediate_size
    attention = config.num_heads * config.head_dim
    yield "embed_tokens.weight", WeightSpec((config.vocab_size, hidden), dtype)
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}"
        yield f"{prefix}.input_norm.weight", WeightSpec((hidden,), dtype)
        yield f"{prefix}.qkv.weight", WeightSpec((config.qkv_size, hidden), dtype)  # rows: query, key, value
        if config.attention_bias:
            yield f"{prefix}.qkv.bias", WeightSpec((config.qkv_size,), dtype)
        yield f"{prefix}.o.weight", WeightSpec((hidden, attention), dtype)
        if config.attention_bias:
            yield f"{prefix}.o.bias", WeightSpec((hidden,), dtype)
        yield f"{prefix}.post_norm.weight", WeightSpec((hidden,), dtype)
        yield f"{prefix}.gate_up.weight", WeightSpec((2 * inter, hidden), dtype)  # rows: gate, up
        yield f"{prefix}.down.weight", WeightSpec((hidden, inter), dtype)
    yield "norm.weight", WeightSpec((hidden,), dtype)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", WeightSpec((config.vocab_size, hidden), dtype)


def _projector(config: ProjectorConfig, hidden: int, dtype: torch.dtype) -> NamedSpecs:
    yield "projector.0.weight", WeightSpec((hidden, config.input_size), dtype)
    yield "projector.0.bias", WeightSpec((hidden,), dtype)
    if config.type == "mlp2x_gelu":
        yield "projector.2.weight", WeightSpec((hidden, hidden), dtype)
        yield "projector.2.bias", WeightSpec((hidden,), dtype)


def _vision(config: ClipConfig, dtype: torch.dtype) -> NamedSpecs:
    hidden, inter = config.hidden_size, config.intermediate_size
    num_positions = config.grid[0] * config.grid[1] + 1  # the class token has a position too

    def affine(name: str, rows: int, columns: int | None) -> NamedSpecs:
        """Weight `[rows, columns]`, or `[rows]` for a layer norm, and its bias `[rows]`."""
        yield f"vision.{name}.weight", WeightSpec((rows,) if columns is None else (rows, columns), dtype)
        yield f"vision.{name}.bias", WeightSpec((rows,), dtype)

    yield "vision.class_embedding", WeightSpec((hidden,), dtype)
    yield "vision.patch_embedding.weight", WeightSpec((hidden, 3 * config.patch_size**2), dtype)
    yield "vision.position_embedding.weight", WeightSpec((num_positions, hidden), dtype)
    yield from affine("pre_norm", hidden, None)
    for layer in range(config.num_layers):
        yield from affine(f"layers.{layer}.norm1", hidden, None)
        yield from affine(f"layers.{layer}.qkv", 3 * hidden, hidden)
        yield from affine(f"layers.{layer}.out", hidden, hidden)
        yield from affine(f"layers.{layer}.norm2", hidden, None)
        yield from affine(f"layers.{layer}.fc1", inter, hidden)
        yield from affine(f"layers.{layer}.fc2", hidden, inter)
