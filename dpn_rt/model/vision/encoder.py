"""What the rest of the runtime asks of a vision encoder and of its configuration, whatever the encoder.

An image is one crop or several (tiles of a large image). A crop has one view of each of the configuration's
`view_shapes`; CLIP's has one. Crops are what an encoder computes a few of at a time, in steps of fixed shape, so that
a device can record them as graphs; from the rows of its crops an encoder assembles those of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dpn_rt.model.layer_pair import LayerPair
from dpn_rt.model.ranks import RankGroup
from dpn_rt.model.reduction.grid import Grid
from dpn_rt.model.vision.preprocessing import Preprocessor
from dpn_rt.model.vision.projector import PREFIX as PROJECTOR_PREFIX
from dpn_rt.model.vision.projector import Projector, ProjectorConfig
from dpn_rt.model.vision.visual_input import ViewShape, VisualInput
from dpn_rt.schema.weights import NamedSpecs

ENCODER_PREFIXES = ("vision.", PROJECTOR_PREFIX)
"""Of the canonical names of encoder and projector."""
Crop = tuple[Tensor, ...]
"""One view of each of an encoder's `view_shapes`."""


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """One image after the projector."""

    rows: Tensor
    """`[num_rows, hidden_size]` decoder rows, in the engine's dtype."""
    grid: Grid
    """Rows and columns of the visual tokens; (1, n) for an image in tiles."""


class VisionEncoder(Protocol):
    """Images to decoder rows."""

    def encode(self, images: Sequence[VisualInput]) -> list[EncodedImage]:
        """Decoder rows of each image. All images have views.

        Raises:
            ImageError: an image has views of other shapes than the encoder takes.
        """


class CropEncoder(Protocol):
    """The forward pass of an encoder and its projector."""

    @property
    def config(self) -> VisionEncoderConfig: ...

    @property
    def crops_per_call(self) -> int:
        """Crops that `forward` takes at once, at most."""

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Decoder rows of some crops. Reads nothing back to the host, so that a graph can record it.

        Args:
            views: `[num_crops, *shape]` for each of the configuration's `view_shapes`, on the encoder's device.

        Returns:
            `[num_crops, rows_per_crop, hidden_size]`.
        """

    def assemble(self, image: VisualInput, crops: Sequence[Tensor]) -> EncodedImage:
        """One image from the rows of its crops, `[rows_per_crop, hidden_size]` each."""


class VisionEncoderConfig(Protocol):
    """What an encoder is. Frozen, without tensors; its fields are one object of `engine.json`."""

    @property
    def type(self) -> str:
        """The tag of its class in `engine.json`."""

    @property
    def summary(self) -> str:
        """A few words for people, such as "336-pixel images"."""

    @property
    def hidden_size(self) -> int:
        """Features of a visual token before the projector."""

    @property
    def grid(self) -> Grid | None:
        """Rows and columns of an image's visual tokens; None where they depend on the image."""

    @property
    def max_visual_tokens(self) -> int:
        """Rows that one image puts into the prompt, at most."""

    @property
    def view_shapes(self) -> tuple[ViewShape, ...]:
        """Shapes of the views of one crop."""

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Head sizes of its attention layers: kernels take only some."""

    @property
    def flops_per_crop(self) -> int:
        """FLOPs of one crop, without the projector."""

    def weight_specs(self, dtype: torch.dtype) -> NamedSpecs:
        """Its weights, in the order of the file; their names begin with `vision.`."""

    def layer_pairs(self) -> Iterator[LayerPair]:
        """The layers that ranks may share, which should be most of its weights; each rank has the others whole."""

    def problems(self, *, needs_grid: bool) -> Iterator[str]:
        """What contradicts itself.

        Args:
            needs_grid: visual tokens will be reduced by their place in the grid, so each must have one.
        """

    def check_views(self, image: VisualInput) -> None:
        """Refuse an image that was made for another encoder.

        Raises:
            ImageError: with the shapes found and expected.
        """

    def preprocessor(self, directory: Path | None, *, pads: bool, max_pixels: int) -> Preprocessor | None:
        """What makes images ready; None where the engine lacks the files for it.

        Args:
            directory: the engine's processor files; None where it has none for images.
            pads: pad images to a square first, as LLaVA does.
            max_pixels: bound of every intermediate image.

        Raises:
            EngineError: a file cannot be loaded.
        """

    def load(
        self, weights: Mapping[str, Tensor], projector: Projector, *, prepack: bool, group: RankGroup | None = None
    ) -> CropEncoder:
        """The encoder with its part of an engine's weights, on the weights' device.

        Args:
            weights: of the engine or of one rank's part, by canonical name.
            projector: that follows.
            prepack: see `Linear`.
            group: the ranks that share its `layer_pairs`; None: it is whole.
        """


class ImageEncoder:
    """A `VisionEncoder` whose weights and views are in the same memory: some crops at a time, directly."""

    def __init__(self, encoder: CropEncoder) -> None:
        self._encoder = encoder

    def encode(self, images: Sequence[VisualInput]) -> list[EncodedImage]:
        """Decoder rows of each image."""
        return encode_images(self._encoder, images, lambda crops: self._encoder.forward(stack_views(crops)).unbind(0))


def load_encoder(
    vision: VisionEncoderConfig | None,
    projector: ProjectorConfig | None,
    weights: Mapping[str, Tensor],
    *,
    prepack: bool,
    group: RankGroup | None = None,
) -> CropEncoder | None:
    """Encoder and projector; None for an engine without. `group`: the ranks that share both."""
    if vision is None or projector is None:
        return None
    loaded = Projector(projector, weights, prepack=prepack, group=group)
    return vision.load(weights, loaded, prepack=prepack, group=group)


def encoder_pairs(
    vision: VisionEncoderConfig | None, projector: ProjectorConfig | None, hidden_size: int
) -> list[LayerPair]:
    """What ranks may share of encoder and projector; `hidden_size` is the decoder's."""
    if vision is None or projector is None:
        return []
    return [*vision.layer_pairs(), *projector.layer_pairs(hidden_size)]


def encode_images(
    encoder: CropEncoder, images: Sequence[VisualInput], run: Callable[[Sequence[Crop]], Sequence[Tensor]]
) -> list[EncodedImage]:
    """Decoder rows of each image.

    Args:
        encoder: whose crops and images these are.
        images: all with views.
        run: at most `crops_per_call` crops to the rows of each, `[rows_per_crop, hidden_size]`.

    Raises:
        ImageError: an image has views of other shapes than the encoder takes.
    """
    for image in images:
        encoder.config.check_views(image)
    step, views_per_crop = encoder.crops_per_call, len(encoder.config.view_shapes)
    views = [view for image in images for view in image.views]
    crops = [tuple(views[first : first + views_per_crop]) for first in range(0, len(views), views_per_crop)]
    rows: list[Tensor] = []
    for first in range(0, len(crops), step):
        rows += run(crops[first : first + step])
    encoded, first = [], 0
    for image in images:
        num_crops = len(image.views) // views_per_crop
        result = encoder.assemble(image, rows[first : first + num_crops])
        made, promised = (result.grid, len(result.rows)), (image.grid, image.num_rows)
        assert made == promised, f"grid and rows {made}, but the preprocessor said {promised}"
        encoded.append(result)
        first += num_crops
    return encoded


def stack_views(crops: Sequence[Crop]) -> list[Tensor]:
    """`[num_crops, *shape]` for each view of a crop."""
    return [torch.stack(views) for views in zip(*crops, strict=True)]
