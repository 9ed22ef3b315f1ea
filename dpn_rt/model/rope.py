"""The table of rotary angles that all layers and stages share."""

from __future__ import annotations

import torch
from torch import Tensor

from dpn_rt.format.config import DecoderConfig
from dpn_rt.format.rope import rope_frequencies


def rope_table(config: DecoderConfig, num_positions: int) -> Tensor:
    """`[num_positions, head_dim]` float32: cosines in the first half of each row, sines in the second.

    The angle is position * (1 / theta^(2i/d)) with the reciprocal taken first, in float32, as in the published models;
    dividing instead moves logits by 1e-4 at position 1000. Scaled variants come from transformers' own rules.
    """
    frequencies, scale = rope_frequencies(config)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies[None, :]
    return torch.cat((angles.cos() * scale, angles.sin() * scale), dim=1)
