"""Canonical names of what LLaVA-HR's tower has in addition to CLIP's weights: modules, with `weight` and `bias`."""

from __future__ import annotations

from dpn_rt.model.vision.clip.names import TOWER

SLOW, ADAPTERS = f"{TOWER}.slow", f"{TOWER}.adapters"

STEM, STEM_NORM = f"{SLOW}.stem", f"{SLOW}.stem_norm"
DOWNSAMPLE_NORM, DOWNSAMPLE = "downsample_norm", "downsample"
"""Parts of a stage, from the second on."""
DEPTHWISE, NORM, FC1, FC2 = "depthwise", "norm", "fc1", "fc2"
"""Parts of a block."""
LAYER_SCALE = "layer_scale"
"""A weight of a block itself, not a module."""

SLOW_CONV, SLOW_PROJ, FAST_CONV, FAST_PROJ = "slow_conv", "slow_proj", "fast_conv", "fast_proj"
GATE_HIDDEN, GATE = "gate_hidden", "gate"
"""Parts of an adapter; the final mix has `slow_proj` and `fast_proj`."""
MIX = f"{TOWER}.mix"


def stage_module(stage: int, part: str) -> str:
    """The name of a part of a ConvNeXt stage."""
    return f"{SLOW}.stages.{stage}.{part}"


def block_module(stage: int, block: int, part: str = "") -> str:
    """The name of a ConvNeXt block, or of a part of it."""
    name = stage_module(stage, f"blocks.{block}")
    return f"{name}.{part}" if part else name


def adapter_module(adapter: int, part: str) -> str:
    """The name of a part of an adapter."""
    return f"{ADAPTERS}.{adapter}.{part}"


def mix_module(part: str) -> str:
    """The name of a part of the final mix."""
    return f"{MIX}.{part}"


def is_strided(module: str) -> bool:
    """Whether a module is a convolution whose stride is its kernel; its columns are pixels of all channels."""
    return module == STEM or (module.startswith(f"{SLOW}.") and module.endswith(f".{DOWNSAMPLE}"))
