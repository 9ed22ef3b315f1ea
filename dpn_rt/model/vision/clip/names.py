"""Canonical names of the tower's weights: a module, and the suffix `weight` or `bias`."""

from __future__ import annotations

TOWER = "vision"
LAYERS = f"{TOWER}.layers"
CLASS_EMBEDDING = f"{TOWER}.class_embedding"
"""A weight, not a module."""
PATCH_EMBEDDING, POSITION_EMBEDDING, PRE_NORM = (
    f"{TOWER}.{part}" for part in ("patch_embedding", "position_embedding", "pre_norm")
)
NORM1, QKV, OUT, NORM2, FC1, FC2 = "norm1", "qkv", "out", "norm2", "fc1", "fc2"
"""Parts of a layer."""


def layer_module(layer: int, part: str) -> str:
    """The name of a layer's part."""
    return f"{LAYERS}.{layer}.{part}"
