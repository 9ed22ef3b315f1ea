"""Small random engines for the runtime's tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpn_rt.cache.block_allocator import count_blocks
from dpn_rt.cache.kv_pool import KvGeometry
from dpn_rt.format.config import ModelConfig, PromptConfig
from dpn_rt.format.engine_dir import EngineSource, write_engine
from dpn_rt.format.weight_spec import weight_spec
from dpn_rt.model.config import DecoderConfig, RopeConfig
from dpn_rt.model.reduction.pooling_config import BoundaryConfig, PoolingConfig
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.projector import ProjectorConfig
from dpn_rt.model.vision.visual_input import VisualInput
from dpn_rt.schema.weights import TORCH_DTYPES

ROUTER_ID = 99
# Every route fits these grids. A grid of 24 x 2 would not do: it could become 24 x 1, which no 1 x 2 kernel fits.
GRIDS = [(12, 12), (4, 4), None, (5, 5), (8, 8), (3, 7), (1, 1), (10, 6), (9, 2), None, (16, 16), (2, 20)]
VOCAB_SIZE = 100
KERNELS = ((1, 1), (1, 2), (2, 2))

DECODER = DecoderConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_layers=7,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope=RopeConfig(10000.0),
    max_position_embeddings=512,
    tie_word_embeddings=False,
    qkv_bias=False,
    o_bias=False,
)
# Stages of 2, 1, 2 and 2 layers: KV blocks hold one layer each.
PYRAMID = PoolingConfig(
    boundaries=tuple(BoundaryConfig(layer, KERNELS) for layer in (1, 2, 4)),
    use_router_token=True,
)
PROMPT = PromptConfig(
    template="vicuna_v1",
    image_aspect_ratio="pad",
    bos_token_id=1,
    eos_token_ids=(2,),
    image_token_id=None,
    router_token_id=ROUTER_ID,
    has_tokenizer=False,
    has_image_processor=False,
)
VISION = ClipConfig(
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    image_size=56,
    patch_size=14,
    layer_norm_eps=1e-5,
    activation="quick_gelu",
    select_feature="patch",
)
MODEL = ModelConfig("float32", DECODER, PYRAMID, PROMPT, VISION, ProjectorConfig("mlp2x_gelu", 32))


def random_weights(model: ModelConfig, seed: int | None = None) -> list[tuple[str, torch.Tensor]]:
    """Weights that keep activations near one; routers strong enough that samples take different routes.

    Without a seed by the test's own: in one test always the same.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
    weights = []
    for name, spec in weight_spec(model).items():
        tensor = torch.randn(spec.shape, generator=generator)
        if "norm" in name:
            tensor = 1 + 0.1 * tensor if name.endswith("weight") else 0.1 * tensor
        elif name.endswith("predictor.weight"):
            tensor = 20 * tensor
        elif name.startswith("embed") or "position" in name:
            tensor = tensor.clone()
        elif tensor.ndim == 2:
            tensor = tensor / spec.shape[1] ** 0.5
        else:
            tensor = 0.1 * tensor
        weights.append((name, tensor.to(spec.dtype)))
    return weights


def write_random_engine(path: Path, model: ModelConfig = MODEL, seed: int | None = None) -> Path:
    write_engine(path, model, EngineSource("0" * 64, "original"), random_weights(model, seed), {}, force=False)
    return path


def kv_geometry(model: ModelConfig = MODEL) -> KvGeometry:
    return KvGeometry.of_model(model.decoder, model.stage_layers, TORCH_DTYPES[model.dtype])


def kv_bytes(num_rows: int, block_size: int, model: ModelConfig = MODEL) -> int:
    """Bytes of a pool that has just enough room for one sequence of `num_rows` rows in every stage."""
    geometry = kv_geometry(model)
    groups = geometry.layer_groups
    return count_blocks([num_rows] * len(groups), groups, block_size) * geometry.block_bytes(block_size)


def with_pyramid(model: ModelConfig = MODEL, **changes: Any) -> ModelConfig:
    return dataclasses.replace(model, reduction=dataclasses.replace(model.reduction, **changes))


def with_decoder(model: ModelConfig = MODEL, **changes: Any) -> ModelConfig:
    return dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, **changes))


def random_images(count: int, vision: ClipConfig = VISION) -> list[VisualInput]:
    """Images for the encoder of `MODEL`, or of a model with another tower."""
    shape = vision.view_shapes[0]
    return [VisualInput.of_views((torch.randn(shape),), vision.grid, vision.num_visual_tokens) for _ in range(count)]


def random_prompt(
    random: np.random.Generator, grid: tuple[int, int] | None, hidden_size: int = DECODER.hidden_size
) -> dict[str, Any]:
    """Token ids around an image of `grid` visual tokens with a router token near the end, or text alone."""
    before, after = random.integers(1, 12, 2)
    ids = random.integers(3, ROUTER_ID, before + after).tolist()
    if grid is None:
        return {"prompt_token_ids": ids}
    ids = [*ids[:before], -200, *ids[before:], ROUTER_ID, *random.integers(3, ROUTER_ID, 2).tolist()]
    embeds = torch.from_numpy(random.standard_normal((grid[0] * grid[1], hidden_size)).astype(np.float32))
    return {"prompt_token_ids": ids, "multi_modal_data": {"image_embeds": embeds, "image_grid": grid}}
