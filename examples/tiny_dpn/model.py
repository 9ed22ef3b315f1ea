"""The small model: CLIP tower, projector and LLaMA decoder, either dense, with fixed pooling, or with routers."""

from __future__ import annotations

from typing import Literal

from dpn_rt.format.config import ModelConfig, PromptConfig, ReductionConfig
from dpn_rt.model.config import DecoderConfig, RopeConfig
from dpn_rt.model.reduction.pooling_config import BoundaryConfig, PoolingConfig
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.projector import ProjectorConfig
from examples.tiny_dpn.scenes import PATCH, SIDE
from examples.tiny_dpn.tokenizer import BOS, EOS, ROUTER

Variant = Literal["dense", "static", "dpn"]
VARIANTS: tuple[Variant, ...] = ("dense", "static", "dpn")

HIDDEN = 192
LAYERS = 8
POOLING_LAYERS = (0, 1, 3)
EXPERTS = ((1, 1), (1, 2), (2, 2))


def model_config(variant: Variant, vocab_size: int) -> ModelConfig:
    """The configuration of a variant. All variants have the same weights, except for the routers."""
    return ModelConfig(
        dtype="float32",
        decoder=DecoderConfig(
            vocab_size=vocab_size,
            hidden_size=HIDDEN,
            intermediate_size=512,
            num_layers=LAYERS,
            num_heads=6,
            num_kv_heads=6,
            head_dim=32,
            rms_norm_eps=1e-5,
            rope=RopeConfig(10000.0),
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            qkv_bias=False,
            o_bias=False,
        ),
        reduction=_reduction(variant),
        prompt=PromptConfig("vicuna_v1", "pad", BOS, (EOS,), None, ROUTER, True, True),
        vision=ClipConfig(HIDDEN, 4 * HIDDEN, 4, 6, SIDE, PATCH, 1e-5, "quick_gelu", "patch"),
        projector=ProjectorConfig("mlp2x_gelu", HIDDEN),
    )


def _reduction(variant: Variant) -> ReductionConfig:
    if variant == "dense":
        return NoReduction()
    if variant == "static":
        return PoolingConfig(tuple(BoundaryConfig(layer, (EXPERTS[-1],)) for layer in POOLING_LAYERS), "static")
    return PoolingConfig(tuple(BoundaryConfig(layer, EXPERTS) for layer in POOLING_LAYERS), use_router_token=True)
