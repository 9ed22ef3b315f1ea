"""Families of decoders: what transformers takes for keys that config.json leaves out, and which biases there are.

A family whose layers are LLaMA's but for biases is one row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers."""

    defaults: Mapping[str, int]
    """Sizes, and ids of tokens."""
    has_qkv_bias: bool | None = None
    """Bias of queries, keys and values, and none of attention's output; None: config.json's `attention_bias` says
    whether all four have one."""


_LLAMA_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
_LLAMA_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}

LLAMA = Family({**_LLAMA_SIZES, **_LLAMA_TOKENS})
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
    ),
    "qwen2": Family(
        {
            **_LLAMA_SIZES,
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "max_position_embeddings": 32768,
        },
        has_qkv_bias=True,
    ),
}
