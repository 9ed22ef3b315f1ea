"""Random LLaVA checkpoints as transformers saves them, with a tokenizer and an image processor."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipImageProcessor

from tests.tiny_tokenizer import make_tokenizer

IMAGES = Path(__file__).parents[2] / "examples" / "images"
OLD_NAMES = [  # transformers 4, and some releases of 5
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
]
NEW_NAMES = [
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
]


def save_checkpoint(
    path: Path, *, tied: bool, kv_heads: int, old_names: bool, family: str = "llama", tower: str = "clip", **text: Any
) -> LlavaForConditionalGeneration:
    """A random LLaVA with tokenizer and image processor in `path`, and the model itself."""
    tokenizer = make_tokenizer(path, router=False, image=True)
    config = LlavaConfig(
        vision_config=tower_config(tower),
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
        text_config=decoder_config(
            family,
            vocab_size=tokenizer.vocab_size + 7,  # padded, as published models are
            num_key_value_heads=kv_heads,
            tie_word_embeddings=tied,
            **text,
        ),
        image_token_index=tokenizer.image_id,
        tie_word_embeddings=tied,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
        if tied:
            model.tie_weights()
    model.save_pretrained(path)
    if tower == "siglip":
        SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(path)
    else:
        write_clip_processor(path)
    weights = load_file(path / "model.safetensors")
    for pattern, name in OLD_NAMES if old_names else NEW_NAMES:
        weights = {re.sub(pattern, name, key): tensor for key, tensor in weights.items()}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    assert any(name.startswith("language_model." if old_names else "model.language_model.") for name in weights)
    return model


def tower_config(kind: str) -> Any:
    """Of a small CLIP or SigLIP tower for images of 56 pixels: 4 x 4 visual tokens."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    head = {"vision_use_head": False} if kind == "siglip" else {}
    return AutoConfig.for_model(f"{kind}_vision_model", image_size=56, patch_size=14, **sizes, **head)


def decoder_config(family: str, **values: Any) -> Any:
    """Of a small decoder."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    return AutoConfig.for_model(family, **{"max_position_embeddings": 256, **sizes, **values})


def write_clip_processor(path: Path) -> None:
    (path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "do_convert_rgb": True,
                "size": {"shortest_edge": 56},
                "crop_size": {"height": 56, "width": 56},
                "do_resize": True,
                "do_center_crop": True,
                "do_normalize": True,
                "do_rescale": True,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "resample": 3,
            }
        )
    )
