"""The table of rotary angles that all layers and stages share."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dpn_rt.errors import ConfigError
from dpn_rt.model.config import DecoderConfig
from dpn_rt.schema.json_text import parse_json
from dpn_rt.schema.text import shown


def rope_table(config: DecoderConfig, num_positions: int) -> Tensor:
    """`[num_positions, head_dim]` float32: cosines in the first half of each row, sines in the second.

    The angle is position * (1 / theta^(2i/d)) with the reciprocal taken first, in float32, as in the published models;
    dividing instead moves logits by 1e-4 at position 1000. Scaled variants come from transformers' own rules.
    """
    frequencies, scale = rope_frequencies(config)
    angles = torch.arange(num_positions, dtype=torch.float32, device="cpu")[:, None] * frequencies[None, :]
    return torch.cat((angles.cos() * scale, angles.sin() * scale), dim=1)


def rotate(x: Tensor, cos_sin: Tensor, positions: Tensor) -> Tensor:
    """Rotated queries or keys, computed in float32.

    Args:
        x: `[num_rows, num_heads, head_dim]`.
        cos_sin: as `rope_table` makes it.
        positions: `[num_rows]` int64.

    Returns:
        As `x`.
    """
    cos, sin = cos_sin.index_select(0, positions)[:, None].chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope_frequencies(config: DecoderConfig) -> tuple[Tensor, float]:
    """`[head_dim / 2]` float32 angle per position, and the factor on cosines and sines.

    Raises:
        ConfigError: the scaling is unknown, or lacks a parameter or has one that makes no sense.
    """
    if not config.rope.scaling_json:
        return _unscaled(config), 1.0
    name = f"rope scaling {config.rope.scaling_json:.200}"
    scaling = parse_json(config.rope.scaling_json, name, ConfigError)
    if not isinstance(scaling, dict):
        raise ConfigError(f"{name}: expected a JSON object")
    try:
        frequencies, scale = _scaled(config, scaling)
    except Exception as error:  # transformers' rules raise whatever a wrong parameter leads to
        is_missing = isinstance(error, KeyError) and error.args and error.args[0] not in scaling.values()
        reason = (
            f"{error} is missing" if is_missing else "no frequencies can be computed, expected transformers' values"
        )
        raise ConfigError(f"{name}: {reason}") from error
    if frequencies.shape != (config.head_dim // 2,) or not bool(frequencies.isfinite().all()):
        raise ConfigError(f"{name}: gives the frequencies {shown(frequencies.tolist())}")
    if not 0 < scale < math.inf:
        raise ConfigError(f"{name}: gives the attention factor {scale}, expected a positive number")
    return frequencies, scale


def _unscaled(config: DecoderConfig) -> Tensor:
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    return 1.0 / (config.rope.theta**exponents)


def _scaled(config: DecoderConfig, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return _unscaled(config), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_theta": config.rope.theta, "rope_type": kind, **scaling}
    # The attributes that these functions read of a model configuration, in transformers 4 and 5.
    model = SimpleNamespace(
        rope_theta=config.rope.theta,
        rope_scaling=parameters,
        rope_parameters=parameters,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_position_embeddings,
        partial_rotary_factor=1.0,
        standardize_rope_params=lambda: None,
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](model, torch.device("cpu"))
    return frequencies.float(), float(scale)
