"""SigLIP's vision tower as a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpn_rt.model.vision.clip.config import ClipConfig


@dataclass(frozen=True)
class SiglipConfig(ClipConfig):
    """A SigLIP ViT, cut after the layer whose hidden state is used. CLIP's tower runs it; here is what differs."""

    type: Literal["siglip"] = "siglip"  # type: ignore[assignment]

    @property
    def num_prefix_rows(self) -> int:
        """None: there is no class row."""
        return 0

    @property
    def has_pre_norm(self) -> bool:
        return False

    @property
    def has_patch_bias(self) -> bool:
        return True
