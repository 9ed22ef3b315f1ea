"""The decoder's weights: their canonical names and shapes, and what a layer holds of them.

The name of a weight is that of its module and a suffix: `layers.3.qkv` and `weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.linear import Linear, linear_specs, load_linear
from dpn_rt.schema.weights import NamedSpecs, WeightSpec

EMBED_TOKENS, LAYERS, FINAL_NORM, LM_HEAD = "embed_tokens", "layers", "norm", "lm_head"
INPUT_NORM, QKV, O_PROJ, POST_NORM, GATE_UP, DOWN = "input_norm", "qkv", "o", "post_norm", "gate_up", "down"
"""Parts of a layer."""


def layer_module(layer: int, part: str) -> str:
    """Canonical name of a layer's part."""
    return f"{LAYERS}.{layer}.{part}"


def head_module(config: DecoderConfig) -> str:
    """Canonical name of the module whose weight the output layer multiplies with."""
    return EMBED_TOKENS if config.tie_word_embeddings else LM_HEAD


def decoder_specs(config: DecoderConfig, dtype: torch.dtype) -> NamedSpecs:
    """Every weight of the decoder, all in `dtype`, in the order of the file."""
    is_head, shape = config.tie_word_embeddings, (config.vocab_size, config.hidden_size)
    yield f"{EMBED_TOKENS}.weight", WeightSpec(shape, dtype, least_bits=8, kept_by_int8=not is_head)
    for layer in range(config.num_layers):
        yield from _layer_specs(config, layer, dtype)
    yield f"{FINAL_NORM}.weight", WeightSpec((config.hidden_size,), dtype)
    if not config.tie_word_embeddings:
        yield from linear_specs(LM_HEAD, config.vocab_size, config.hidden_size, dtype, bias=False, least_bits=8)


def _layer_specs(config: DecoderConfig, layer: int, dtype: torch.dtype) -> NamedSpecs:
    hidden, inter = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def norm(part: str) -> NamedSpecs:
        yield f"{layer_module(layer, part)}.weight", WeightSpec((hidden,), dtype)

    def linear(part: str, rows: tuple[int, ...], columns: int, bias: bool = False) -> NamedSpecs:
        module = layer_module(layer, part)
        return linear_specs(module, sum(rows), columns, dtype, bias=bias, fused=rows, least_bits=4)

    yield from norm(INPUT_NORM)
    yield from linear(QKV, (query, key, key), hidden, config.qkv_bias)
    yield from linear(O_PROJ, (hidden,), query, config.o_bias)
    yield from norm(POST_NORM)
    yield from linear(GATE_UP, (inter, inter), hidden)
    yield from linear(DOWN, (hidden,), inter)


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer."""

    input_norm: Tensor  # [hidden_size]
    qkv: Linear  # [num_heads * head_dim + 2 * num_kv_heads * head_dim, hidden_size]
    o: Linear  # [hidden_size, num_heads * head_dim]
    post_norm: Tensor  # [hidden_size]
    gate_up: Linear  # [2 * intermediate_size, hidden_size]
    down: Linear  # [hidden_size, intermediate_size]
    query: Linear  # the part of `qkv` that makes queries
    key: Linear  # the part of `qkv` that makes keys
    value: Linear  # the part of `qkv` that makes values

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], layer: int, config: DecoderConfig, *, prepack: bool) -> LayerWeights:
        """Those of a layer among the tensors of an engine; `prepack` as of `Weight.load`."""
        num_queries, num_keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        first_value = num_queries + num_keys

        def norm(part: str) -> Tensor:
            return tensors[f"{layer_module(layer, part)}.weight"]

        def linear(part: str) -> Linear:
            return load_linear(tensors, layer_module(layer, part), prepack=prepack)

        def part(rows: slice) -> Linear:
            return load_linear(tensors, layer_module(layer, QKV), prepack=False, rows=rows)

        return cls(
            norm(INPUT_NORM),
            linear(QKV),
            linear(O_PROJ),
            norm(POST_NORM),
            linear(GATE_UP),
            linear(DOWN),
            part(slice(0, num_queries)),
            part(slice(num_queries, first_value)),
            part(slice(first_value, first_value + num_keys)),
        )
