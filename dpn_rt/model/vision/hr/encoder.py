"""LLaVA-HR's forward pass: slow features are mixed into the fast path's CLIP, between its layers and at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt.model.ranks import RankGroup
from dpn_rt.model.vision.clip.tower import ClipTower, run_layers
from dpn_rt.model.vision.encoder import EncodedImage
from dpn_rt.model.vision.hr.config import NUM_QUARTERS, PREPOOL, HrConfig
from dpn_rt.model.vision.hr.convnext import ConvNext
from dpn_rt.model.vision.hr.mix import Adapter, Mix
from dpn_rt.model.vision.projector import Projector
from dpn_rt.model.vision.visual_input import VisualInput

CROPS_ON_DEVICE = 4
"""Images that go through the tower together on a device. On the CPU one image fills all cores, and memory counts."""


class HrEncoder:
    """A `CropEncoder`: tower and projector. Every image is one crop with one view."""

    def __init__(
        self,
        config: HrConfig,
        weights: Mapping[str, Tensor],
        projector: Projector,
        *,
        prepack: bool,
        group: RankGroup | None = None,
    ) -> None:
        """Takes what `config.weight_specs` names from the weights of an engine, or of a rank's part of it."""
        self.config = config
        self.slow = ConvNext(config.slow, weights, prepack=prepack, group=group)
        self.fast = ClipTower(config.fast, weights, prepack=prepack, group=group)
        side = config.fast.grid[0]
        self._adapters = [Adapter(weights, index, side, prepack=prepack) for index in range(config.num_adapters)]
        self._mix = Mix(weights, side, prepack=prepack)
        self._projector = projector
        self._is_cpu = next(iter(weights.values())).is_cpu

    @property
    def crops_per_call(self) -> int:
        return 1 if self._is_cpu else CROPS_ON_DEVICE

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """`[num_images, 3, image_size, image_size]` -> `[num_images, num_visual_tokens, decoder hidden_size]`."""
        (pixel_values,) = views
        features = self.mixed(self.slow.forward(pixel_values), pixel_values)
        if self.config.prepools:
            features = self._pooled(features)
        return self._projector.forward(features).view(len(pixel_values), self.config.num_visual_tokens, -1)

    def mixed(self, slow: Tensor, pixel_values: Tensor) -> Tensor:
        """The fast path with the slow features mixed in.

        Args:
            slow: `[num_images, slow_side, slow_side, channels]` of the slow path.
            pixel_values: `[num_images, 3, image_size, image_size]`.

        Returns:
            `[num_images * num_patches, hidden_size]`.
        """
        config, num_rows = self.config.fast, self.config.fast.num_rows
        x = self.fast.embed(self.fast_pixels(pixel_values))
        cu_seqlens = torch.arange(0, x.shape[0] + 1, num_rows, dtype=torch.int32, device=x.device)
        quarter = config.num_layers // NUM_QUARTERS
        for index in range(NUM_QUARTERS):
            layers = self.fast.layers[index * quarter : (index + 1) * quarter]
            x = run_layers(layers, x, cu_seqlens, config)
            if index < len(self._adapters):
                self._adapters[index].add_to(x, slow)
        return self._mix.forward(x, slow)

    def fast_pixels(self, pixel_values: Tensor) -> Tensor:
        """The normalised pixels, shrunk to the fast path's size in float32: `[num_images, 3, fast size, fast size]`."""
        size = self.config.fast.image_size
        return functional.interpolate(pixel_values.float(), (size, size), mode="bilinear", align_corners=True)

    def _pooled(self, features: Tensor) -> Tensor:
        """Each 2x2 features averaged; the last row and column of odd grids are left out."""
        height, width = self.config.fast.grid
        image = features.view(-1, height, width, features.shape[-1]).permute(0, 3, 1, 2)
        pooled = functional.avg_pool2d(image, PREPOOL).permute(0, 2, 3, 1)
        return pooled.reshape(-1, features.shape[-1])

    def assemble(self, image: VisualInput, crops: Sequence[Tensor]) -> EncodedImage:
        """The rows of the one crop."""
        (rows,) = crops
        return EncodedImage(rows, self.config.grid)
