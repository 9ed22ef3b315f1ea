"""A random checkpoint as transformers saves it, of weights and config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration


def bare(name: str) -> str:
    """The name without any of the wrappers of transformers' versions."""
    name = name.removeprefix("model.").replace("language_model.lm_head", "lm_head")
    return name.replace("language_model.model.", "language_model.").replace(
        "vision_tower.vision_model.", "vision_tower."
    )


def save_model(
    path: Path, *, tied: bool = False, bias: bool = False, max_positions: int = 256
) -> dict[str, torch.Tensor]:
    """Save a tiny random model; returns its weights by bare name."""
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=bias,
        rms_norm_eps=1e-5,
        max_position_embeddings=max_positions,
    )
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=28, patch_size=7
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=99, tie_word_embeddings=tied)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(path)
    return {bare(name): tensor.clone() for name, tensor in model.state_dict().items()}


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
