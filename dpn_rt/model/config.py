"""Shape of the decoder."""

from __future__ import annotations

from dataclasses import dataclass

from dpn_rt.schema.bounds import Epsilon, HeadDim, Heads, Layers, Positions, Theta, Vocabulary, Width


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `theta`, and transformers' `rope_scaling` dictionary as JSON text (empty: none)."""

    theta: Theta
    scaling_json: str = ""


@dataclass(frozen=True)
class DecoderConfig:
    """LLaMA decoder."""

    vocab_size: Vocabulary
    hidden_size: Width
    intermediate_size: Width
    num_layers: Layers
    num_heads: Heads
    num_kv_heads: Heads
    head_dim: HeadDim
    rms_norm_eps: Epsilon
    rope: RopeConfig
    max_position_embeddings: Positions
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
