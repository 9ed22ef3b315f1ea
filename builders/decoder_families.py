"""Families of decoders: what transformers takes for keys that config.json leaves out, and how layers differ.

A family whose layers are LLaMA's but for biases, windows and norms of heads is one row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Windows = Literal["never", "always", "on request"]


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers."""

    defaults: Mapping[str, int]
    """Sizes, and ids of tokens."""
    has_qkv_bias: bool | None = None
    """Bias of queries, keys and values, and none of attention's output; None: config.json's `attention_bias` says
    whether all four have one."""
    windows: Windows = "never"
    """Which layers have `sliding_window`: none; all; or, where `use_sliding_window` is true, those that `layer_types`
    or `max_window_layers` names."""
    qk_norm: bool = False
    """Whether heads of queries and keys are normed."""
    original_names: tuple[str, ...] = ()
    """Its `model_type` in the original layout."""


_LLAMA_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
_LLAMA_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
_QWEN_SIZES = {
    **_LLAMA_SIZES,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

LLAMA = Family({**_LLAMA_SIZES, **_LLAMA_TOKENS}, original_names=("llava_llama", "llava"))
FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA,
    "mistral": Family(
        {
            **_LLAMA_SIZES,
            **_LLAMA_TOKENS,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        has_qkv_bias=False,
        windows="always",
        original_names=("llava_mistral",),
    ),
    "qwen2": Family(_QWEN_SIZES, has_qkv_bias=True, windows="on request", original_names=("llava_qwen", "llava_qwen2")),
    "qwen3": Family(
        {**_QWEN_SIZES, "head_dim": 128},
        windows="on request",
        qk_norm=True,
        original_names=("llava_qwen3",),
    ),
}
ORIGINAL_FAMILIES: Mapping[str, Family] = {
    name: family for family in FAMILIES.values() for name in family.original_names
}
"""By the `model_type` of the original layout."""
