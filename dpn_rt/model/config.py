"""Shape of the decoder."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dpn_rt.schema.bounds import Epsilon, HeadDim, Heads, Layers, Positions, Theta, Vocabulary, Width


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `theta`, and transformers' `rope_scaling` dictionary as JSON text (empty: none)."""

    theta: Theta
    scaling_json: str = ""


@dataclass(frozen=True)
class DecoderConfig:
    """LLaMA decoder, or one whose layers differ in what the last fields say."""

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
    windows: tuple[Positions | None, ...] = ()
    """Sliding window of each layer: a row at position p sees the rows at positions p - window + 1 to p; None: all rows
    before it. Empty: no layer has one."""
    qk_norm: bool = False
    """Whether each head of queries and keys is normed before it is rotated (Qwen3)."""

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def window(self, layer: int) -> int | None:
        """The sliding window of one layer."""
        return self.windows[layer] if self.windows else None

    def for_length(self, max_length: int) -> DecoderConfig:
        """The same decoder for sequences of at most `max_length` positions, without windows that hide none of them."""
        return replace(self, windows=shorter_windows(self.windows, max_length))


def shorter_windows(windows: tuple[int | None, ...], max_length: int) -> tuple[int | None, ...]:
    """Windows of layers, without those that hide no row of a sequence of `max_length` positions; empty if none does."""
    shorter = tuple(None if window is None or window >= max_length else window for window in windows)
    return shorter if any(shorter) else ()
