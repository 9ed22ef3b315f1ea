"""A small model with random weights, and what is in an engine's directory."""

from __future__ import annotations

from pathlib import Path

import torch

from dpn_rt.format.config import ModelConfig, PromptConfig
from dpn_rt.format.engine_dir import EngineSource, weight_spec
from dpn_rt.model.config import DecoderConfig, RopeConfig
from dpn_rt.model.reduction.pooling_config import BoundaryConfig, PoolingConfig
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.projector import ProjectorConfig

SOURCE = EngineSource("0" * 64, "synthetic")
MODEL = ModelConfig(
    dtype="bfloat16",
    decoder=DecoderConfig(20, 16, 24, 3, 2, 1, 8, 1e-5, RopeConfig(1e4), 128, False, True, True),
    reduction=PoolingConfig((BoundaryConfig(0, ((1, 1), (1, 2), (2, 2))),), pooling_function="conv"),
    prompt=PromptConfig("vicuna_v1", "pad", 1, (2,), None, None, False, False),
    vision=ClipConfig(8, 12, 1, 1, 28, 7, 1e-5, "quick_gelu", "patch"),
    projector=ProjectorConfig("mlp2x_gelu", 8),
)


def random_weights(model: ModelConfig = MODEL) -> dict[str, torch.Tensor]:
    return {name: torch.randn(spec.shape).to(spec.dtype) for name, spec in weight_spec(model).items()}


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())
