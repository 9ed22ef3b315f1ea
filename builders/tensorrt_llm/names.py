"""Canonical weights of a stage under TensorRT-LLM's names, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dpn_rt.model.config import DecoderConfig

_WHOLE = {
    "input_norm.weight": "input_layernorm.weight",
    "qkv.weight": "attention.qkv.weight",
    "qkv.bias": "attention.qkv.bias",
    "o.weight": "attention.dense.weight",
    "o.bias": "attention.dense.bias",
    "post_norm.weight": "post_layernorm.weight",
    "down.weight": "mlp.proj.weight",
}
_GATE, _UP = "mlp.fc.weight", "mlp.gate.weight"
"""As TensorRT-LLM has them: its `fc` goes through the activation, its `gate` is multiplied."""


def export_stage(
    config: DecoderConfig, weights: Mapping[str, Tensor], layers: range, is_last: bool
) -> Iterator[tuple[str, Tensor]]:
    """A stage's tensors, layers numbered from 0.

    Args:
        config: of the model.
        weights: canonical, of the whole model.
        layers: of the stage.
        is_last: whether final norm and output layer belong to it.
    """
    for local, layer in enumerate(layers):
        ours, theirs = f"layers.{layer}.", f"transformer.layers.{local}."
        for name, exported in _WHOLE.items():
            if ours + name in weights:
                yield theirs + exported, weights[ours + name]
        gate, up = torch.split(weights[f"{ours}gate_up.weight"], config.intermediate_size)
        yield theirs + _GATE, gate
        yield theirs + _UP, up
    if is_last:
        yield "transformer.ln_f.weight", weights["norm.weight"]
        yield "lm_head.weight", weights["embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
