"""The decoder's weights: their canonical names and shapes, and what a layer holds of them.

The name of a weight is that of its module and a suffix: `layers.3.qkv` and `weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.layer_pair import LayerPair
from dpn_rt.model.linear import Linear, linear_specs, load_linear
from dpn_rt.model.ranks import Product, RankGroup, load_row_parallel, shared_embedding, shared_head
from dpn_rt.model.weights.table import EmbeddingTable
from dpn_rt.schema.activation import ProductActivation
from dpn_rt.schema.weights import NamedSpecs, WeightSpec

EMBED_TOKENS, LAYERS, FINAL_NORM, LM_HEAD = "embed_tokens", "layers", "norm", "lm_head"
INPUT_NORM, QKV, O_PROJ, POST_NORM, GATE_UP, DOWN = "input_norm", "qkv", "o", "post_norm", "gate_up", "down"
Q_NORM, K_NORM = "q_norm", "k_norm"
"""Parts of a layer; the last two of decoders whose heads are normed."""


def layer_module(layer: int, part: str) -> str:
    """Canonical name of a layer's part."""
    return f"{LAYERS}.{layer}.{part}"


def head_module(config: DecoderConfig) -> str:
    """Canonical name of the module whose weight the output layer multiplies with."""
    return EMBED_TOKENS if config.tie_word_embeddings else LM_HEAD


def decoder_pairs(config: DecoderConfig, layer: int) -> tuple[LayerPair, LayerPair]:
    """What ranks share of a layer: its attention and its MLP."""
    hidden, inter = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv, o, gate_up, down = (layer_module(layer, part) for part in (QKV, O_PROJ, GATE_UP, DOWN))
    return (
        LayerPair(qkv, (query, key, key), o, hidden, config.head_dim),
        LayerPair(gate_up, (inter, inter), down, hidden),
    )


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

    def norm(part: str, size: int = hidden) -> NamedSpecs:
        yield f"{layer_module(layer, part)}.weight", WeightSpec((size,), dtype)

    def linear(part: str, rows: tuple[int, ...], columns: int, bias: bool = False) -> NamedSpecs:
        module = layer_module(layer, part)
        return linear_specs(module, sum(rows), columns, dtype, bias=bias, fused=rows, least_bits=4)

    yield from norm(INPUT_NORM)
    yield from linear(QKV, (query, key, key), hidden, config.qkv_bias)
    for part in (Q_NORM, K_NORM) if config.qk_norm else ():
        yield from norm(part, config.head_dim)
    yield from linear(O_PROJ, (hidden,), query, config.o_bias)
    yield from norm(POST_NORM)
    yield from linear(GATE_UP, (inter, inter), hidden)
    yield from linear(DOWN, (hidden,), inter)


@dataclass(frozen=True)
class QkvParts:
    """The parts of `qkv`, each a layer of its own."""

    query: Linear  # [num_heads * head_dim, hidden_size]
    key: Linear  # [num_kv_heads * head_dim, hidden_size]
    value: Linear  # [num_kv_heads * head_dim, hidden_size]

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], layer: int, config: DecoderConfig) -> QkvParts:
        """Views of the fused weight, or copies where it is quantised and a tile holds rows of two parts."""
        ends = list(accumulate((config.num_heads, config.num_kv_heads, config.num_kv_heads), initial=0))
        rows = (slice(first * config.head_dim, end * config.head_dim) for first, end in pairwise(ends))
        module = layer_module(layer, QKV)
        return cls(*(load_linear(tensors, module, prepack=False, rows=part) for part in rows))


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer."""

    input_norm: Tensor  # [hidden_size]
    qkv: Linear  # [num_heads * head_dim + 2 * num_kv_heads * head_dim, hidden_size]
    o: Product  # [hidden_size, num_heads * head_dim]
    post_norm: Tensor  # [hidden_size]
    gated: Linear  # [2 * intermediate_size, hidden_size], and silu(gate) * up of the halves
    down: Product  # [hidden_size, intermediate_size]
    parts: QkvParts | None  # of the first layer after a boundary, whose queries and keys reducers ask for
    q_norm: Tensor | None  # [head_dim]; None: heads are not normed
    k_norm: Tensor | None  # [head_dim]

    @classmethod
    def load(
        cls,
        tensors: Mapping[str, Tensor],
        layer: int,
        config: DecoderConfig,
        *,
        prepack: bool,
        with_parts: bool,
        group: RankGroup | None = None,
    ) -> LayerWeights:
        """Those of a layer among the tensors of an engine; `prepack` as of `Weight.load`, `group` as of `Decoder`."""

        def norm(part: str) -> Tensor:
            return tensors[f"{layer_module(layer, part)}.weight"]

        def linear(part: str, activation: ProductActivation | None = None) -> Linear:
            return load_linear(tensors, layer_module(layer, part), prepack=prepack, activation=activation)

        def row_parallel(part: str) -> Product:
            return load_row_parallel(tensors, layer_module(layer, part), group, prepack=prepack)

        return cls(
            norm(INPUT_NORM),
            linear(QKV),
            row_parallel(O_PROJ),
            norm(POST_NORM),
            linear(GATE_UP, "silu_mul"),
            row_parallel(DOWN),
            QkvParts.load(tensors, layer, config) if with_parts else None,
            norm(Q_NORM) if config.qk_norm else None,
            norm(K_NORM) if config.qk_norm else None,
        )


def load_embedding(
    tensors: Mapping[str, Tensor], config: DecoderConfig, dtype: torch.dtype, group: RankGroup | None
) -> Callable[[Tensor], Tensor]:
    """Token ids `[num_tokens]` -> rows `[num_tokens, hidden_size]` of `dtype`; `group` as of `Decoder`."""
    table = EmbeddingTable(tensors, EMBED_TOKENS, config.hidden_size, dtype)
    return table.rows if group is None else shared_embedding(table.rows, config.vocab_size, group)


def load_head(tensors: Mapping[str, Tensor], config: DecoderConfig, group: RankGroup | None) -> Product:
    """The output layer, `[num_seqs, hidden_size]` -> `[num_seqs, vocab_size]`; `group` as of `Decoder`."""
    head = load_linear(tensors, head_module(config), prepack=False)  # few rows: one for each sequence
    return head if group is None else shared_head(head, config.vocab_size, group)
