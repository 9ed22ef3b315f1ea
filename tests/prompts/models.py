"""Model configurations and processor directories for tests, with only the parts that the processor reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dpn_rt.format.config import ModelConfig, PromptConfig, ReductionConfig
from dpn_rt.model.config import DecoderConfig, RopeConfig
from dpn_rt.model.reduction.pooling_config import BoundaryConfig, PoolingConfig
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.projector import ProjectorConfig
from tests.tiny_tokenizer import TinyTokenizer

HIDDEN_SIZE = 8
IMAGE_SIZE = 28
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PYRAMID = PoolingConfig(
    boundaries=(BoundaryConfig(1, ((1, 1), (1, 2), (2, 2))), BoundaryConfig(3, ((1, 1), (2, 2)))),
    use_router_token=True,
)


def make_model(
    tokenizer: TinyTokenizer | None = None,
    *,
    reduction: ReductionConfig = PYRAMID,
    vision: bool = True,
    template: str = "vicuna_v1",
    aspect_ratio: str = "pad",
    router_id: int | None = None,
    image_id: int | None = None,
    max_positions: int = 512,
) -> ModelConfig:
    """A model over the tokenizer's vocabulary; without one, of 200 ids."""
    tower = ClipConfig(
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=7,
        layer_norm_eps=1e-5,
        activation="quick_gelu",
        select_feature="patch",
    )
    return ModelConfig(
        dtype="float32",
        decoder=DecoderConfig(
            vocab_size=tokenizer.vocab_size if tokenizer else 200,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=16,
            num_layers=6,
            num_heads=2,
            num_kv_heads=2,
            head_dim=4,
            rms_norm_eps=1e-5,
            rope=RopeConfig(10000.0),
            max_position_embeddings=max_positions,
            tie_word_embeddings=False,
            qkv_bias=False,
            o_bias=False,
        ),
        reduction=reduction,
        prompt=PromptConfig(
            template=template,  # type: ignore[arg-type]
            image_aspect_ratio=aspect_ratio,  # type: ignore[arg-type]
            bos_token_id=1,
            eos_token_ids=(2,),
            image_token_id=tokenizer.image_id if tokenizer else image_id,
            router_token_id=tokenizer.router_id if tokenizer else router_id,
            has_tokenizer=tokenizer is not None,
            has_image_processor=vision,
        ),
        vision=tower if vision else None,
        projector=ProjectorConfig("linear", 16) if vision else None,
    )


def write_image_processor(path: Path, size: int = IMAGE_SIZE) -> None:
    """CLIP's `preprocessor_config.json` for images of `size`."""
    path.mkdir(parents=True, exist_ok=True)
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(settings))


def embeds(rows: int = 16) -> torch.Tensor:
    """`[rows, HIDDEN_SIZE]`, the same for the same number of rows."""
    return torch.randn(rows, HIDDEN_SIZE, generator=torch.Generator().manual_seed(rows))
