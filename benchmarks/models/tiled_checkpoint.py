"""Small random models with the demo's tokenizer that take images in tiles: at the price of a test.

LLaVA-NeXT has tiles for every image; LLaVA-OneVision for the only one of a prompt, and an overview of each of several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from examples.tiny_dpn.tokenizer import train_tokenizer, write_tokenizer

Family = Literal["next", "onevision"]
SIDE = 56
"""Of a tile, in pixels."""
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
_PINPOINTS = [[SIDE * rows, SIDE * columns] for rows in range(1, 4) for columns in range(1, 4)]


def write_tiled_checkpoint(path: Path, family: Family, seed: int = 0) -> None:
    """Writes weights, tokenizer and image processor to the directory `path`.

    Its weights are large enough that two tokens are rarely as probable as each other.
    """
    size = train_tokenizer().get_vocab_size()
    tower = {**_SIZES, "num_hidden_layers": 3, "image_size": SIDE, "patch_size": 14}
    text = {
        **_SIZES,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "vocab_size": size + 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    shared: dict[str, Any] = {"image_token_index": size, "image_grid_pinpoints": _PINPOINTS}
    if family == "next":
        vision = {**tower, "model_type": "clip_vision_model", "projection_dim": 64}
        model: Any = LlavaNextForConditionalGeneration(
            LlavaNextConfig(vision_config=vision, text_config={**text, "model_type": "llama"}, **shared)
        )
        square = {"height": SIDE, "width": SIDE}
        processor: Any = LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size=square, image_grid_pinpoints=_PINPOINTS
        )
    else:
        vision = {**tower, "model_type": "siglip_vision_model", "vision_use_head": False}
        model = LlavaOnevisionForConditionalGeneration(
            LlavaOnevisionConfig(
                vision_config=vision,
                text_config={**text, "model_type": "qwen2"},
                video_token_index=size + 1,
                vision_aspect_ratio="anyres_max_9",
                tie_word_embeddings=False,
                **shared,
            )
        )
        half, square = [0.5] * 3, {"height": SIDE, "width": SIDE}
        processor = LlavaOnevisionImageProcessorPil(
            size=square, image_grid_pinpoints=_PINPOINTS, image_mean=half, image_std=half
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15, generator=generator)
    model.eval().save_pretrained(path)
    processor.save_pretrained(path)
    write_tokenizer(path)
