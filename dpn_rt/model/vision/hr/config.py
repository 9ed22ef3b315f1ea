"""LLaVA-HR's vision tower as a configuration: a ConvNeXt (slow path) that is mixed into a CLIP ViT (fast path)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dpn_rt.model.layer_pair import LayerPair
from dpn_rt.model.linear import linear_specs
from dpn_rt.model.ranks import RankGroup
from dpn_rt.model.reduction.grid import Grid, pooled_grid
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.encoder import CropEncoder
from dpn_rt.model.vision.hr import names
from dpn_rt.model.vision.hr.convnext_config import KERNEL, STRIDE, ConvNextConfig, depthwise_specs
from dpn_rt.model.vision.one_view import OneView
from dpn_rt.model.vision.preprocessing import Preprocessor
from dpn_rt.model.vision.projector import Projector
from dpn_rt.schema.bounds import Side
from dpn_rt.schema.weights import NamedSpecs

NUM_QUARTERS = 4
"""Runs of CLIP's layers; an adapter follows each but the last."""
NUM_ADAPTERS = NUM_QUARTERS - 1
PATCH_SIZE = 14
LEAST_FAST_SIZE = 336
PREPOOL = (2, 2)
"""Kernel of the average before the projector, where there is one."""
SIDES_THAT_FIT = "a multiple of 32 from 768 on, or one of 32, 64, 96, 128, 192, 256, 384"


def fast_image_size(image_size: int) -> int:
    """Pixels per side of the fast path's input for images of `image_size`."""
    return max(int(image_size / 32 * PATCH_SIZE), LEAST_FAST_SIZE)


def size_problem(image_size: int) -> str | None:
    """Why the two paths do not fit each other on images of so many pixels; None where they do."""
    slow, fast = image_size // STRIDE, fast_image_size(image_size) // PATCH_SIZE
    if image_size >= STRIDE and image_size % STRIDE == 0 and (slow == fast or fast**2 % slow**2 == 0):
        return None
    return (
        f"images of {image_size} pixels give {slow} x {slow} slow and {fast} x {fast} fast features, which do not fit "
        f"each other: expected {SIDES_THAT_FIT}"
    )


@dataclass(frozen=True)
class FastConfig(ClipConfig):
    """The fast path: CLIP without its class row, which LLaVA-HR leaves out before the first layer."""

    @property
    def num_prefix_rows(self) -> int:
        return 0


@dataclass(frozen=True)
class HrConfig(OneView):
    """LLaVA-HR's tower. A `VisionEncoderConfig`."""

    image_size: Side
    """Pixels per side of the one view, which both paths see."""
    slow: ConvNextConfig
    fast: FastConfig
    has_adapters: bool
    """Whether slow features are also added between the layers of the fast path, and not at its end alone."""
    prepools: bool
    """Whether 2x2 visual features are averaged before the projector."""
    type: Literal["llava_hr"] = "llava_hr"

    @property
    def summary(self) -> str:
        return f"{self.image_size}-pixel images (LLaVA-HR)"

    @property
    def hidden_size(self) -> int:
        return self.fast.hidden_size

    @property
    def slow_side(self) -> int:
        """Rows and columns of the slow path's features."""
        return self.slow.side(self.image_size)

    @property
    def grid(self) -> Grid:
        return pooled_grid(self.fast.grid, PREPOOL)[0] if self.prepools else self.fast.grid

    @property
    def num_visual_tokens(self) -> int:
        """Rows that every image puts into the prompt."""
        return self.grid[0] * self.grid[1]

    @property
    def head_dims(self) -> tuple[int, ...]:
        return self.fast.head_dims

    @property
    def flops_per_crop(self) -> int:
        return self.slow.flops(self.image_size) + self.fast.flops_per_crop + self.mix_flops

    @property
    def mix_flops(self) -> int:
        """FLOPs of adapters and final mix for one image."""
        dim, channels = self.hidden_size, self.slow.dims[-1]
        slow, fast = self.slow_side**2, self.fast.num_patches
        of_adapter = slow * (channels * channels + channels * dim) + fast * (KERNEL**2 * dim + dim * dim) + dim * dim
        of_mix = fast * (channels * dim + dim * dim)
        return 2 * (self.num_adapters * of_adapter + of_mix)

    @property
    def num_adapters(self) -> int:
        return NUM_ADAPTERS if self.has_adapters else 0

    def weight_specs(self, dtype: torch.dtype) -> NamedSpecs:
        """All in `dtype`, in the order of the file."""
        yield from self.slow.weight_specs(dtype)
        yield from self.fast.weight_specs(dtype)
        for adapter in range(self.num_adapters):
            yield from self._adapter_specs(adapter, dtype)
        dim, channels = self.hidden_size, self.slow.dims[-1]
        for part, columns in ((names.FAST_PROJ, dim), (names.SLOW_PROJ, channels)):
            yield from linear_specs(names.mix_module(part), dim, columns, dtype, bias=True, least_bits=8)

    def _adapter_specs(self, adapter: int, dtype: torch.dtype) -> NamedSpecs:
        dim, channels = self.hidden_size, self.slow.dims[-1]

        def linear(part: str, rows: int, columns: int, least_bits: int | None = 8) -> NamedSpecs:
            module = names.adapter_module(adapter, part)
            return linear_specs(module, rows, columns, dtype, bias=True, least_bits=least_bits)

        yield from linear(names.SLOW_CONV, channels, channels)
        yield from linear(names.SLOW_PROJ, dim, channels)
        yield from depthwise_specs(names.adapter_module(adapter, names.FAST_CONV), dim, dtype)
        yield from linear(names.FAST_PROJ, dim, dim)
        yield from linear(names.GATE_HIDDEN, dim // 2, 2 * dim, None)  # one row per image
        yield from linear(names.GATE, 1, dim // 2, None)

    def layer_pairs(self) -> Iterator[LayerPair]:
        """Those of both paths. Adapters and the final mix are a few layers, which every rank has."""
        yield from self.slow.layer_pairs()
        yield from self.fast.layer_pairs()

    def problems(self, *, needs_grid: bool) -> Iterator[str]:
        """Sizes that do not fit together."""
        yield from self.slow.problems()
        fast_problems = [f"fast tower: {problem}" for problem in self.fast.problems(needs_grid=needs_grid)]
        yield from fast_problems
        if fast_problems:
            return
        if self.fast.num_layers % NUM_QUARTERS or not self.fast.num_layers:
            yield f"fast tower: num_layers must be a multiple of {NUM_QUARTERS}, got {self.fast.num_layers}"
        if self.fast.patch_size != PATCH_SIZE:
            yield f"fast tower: patch_size must be {PATCH_SIZE}, got {self.fast.patch_size}"
        if self.fast.select_feature != "patch":
            yield f"fast tower: select_feature must be 'patch', got {self.fast.select_feature!r}"
        problem = size_problem(self.image_size)
        if problem is not None:
            yield f"vision image_size: {problem}"
        elif self.fast.image_size != fast_image_size(self.image_size):
            yield f"fast tower: image_size must be {fast_image_size(self.image_size)}, got {self.fast.image_size}"

    def preprocessor(self, directory: Path | None, *, pads: bool, max_pixels: int) -> Preprocessor | None:
        """LLaVA-HR's own steps, for which no file is needed."""
        from dpn_rt.model.vision.hr.preprocessing import HrPreprocessor  # which imports this module

        return HrPreprocessor(self, pads=pads, max_pixels=max_pixels)

    def load(
        self, weights: Mapping[str, Tensor], projector: Projector, *, prepack: bool, group: RankGroup | None = None
    ) -> CropEncoder:
        """Tower and projector; takes `vision.*`."""
        from dpn_rt.model.vision.hr.encoder import HrEncoder  # which imports this module

        return HrEncoder(self, weights, projector, prepack=prepack, group=group)
