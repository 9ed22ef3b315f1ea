"""Decoder rows of images: given by the user, known from before, or from the vision encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpn_rt.cache.image_cache import ImageCache
from dpn_rt.model.reduction.before_llm import reduce_image
from dpn_rt.model.reduction.grid import IntArray
from dpn_rt.model.vision.encoder import VisionEncoder
from dpn_rt.model.vision.visual_input import VisualInput


@dataclass(frozen=True, eq=False)
class ImageResult:
    """What the decoder gets of an image."""

    rows: Tensor
    """`[num_rows, hidden_size]`."""
    kept: IntArray | None = None
    """`[num_visual_tokens]` which of the encoder's visual tokens these are; None for all of them, or pooled ones."""


class ImageRows:
    """Encodes images, and keeps their rows for prompts to come."""

    def __init__(self, encoder: VisionEncoder | None, dtype: torch.dtype, cache: ImageCache | None = None) -> None:
        """
        Args:
            encoder: None for a model without one, whose images are given as embeddings.
            dtype: of the rows.
            cache: None: rows are not kept.
        """
        self.encoder, self._dtype = encoder, dtype
        self.cache = cache

    def encode(self, images: Sequence[VisualInput]) -> list[ImageResult]:
        """The rows of each image, reduced as it says."""
        sources = [image if image.before_llm is None else image.before_llm.source for image in images]
        rows = {source.handle: self._known_rows(source) for source in sources}
        new = {source.handle: source for source in sources if rows[source.handle] is None}
        if new:
            assert self.encoder is not None, "the processor refuses images without an encoder"
            images_to_encode = list(new.values())
            for source, encoded in zip(images_to_encode, self.encoder.encode(images_to_encode), strict=True):
                rows[source.handle] = encoded.rows
                if self.cache is not None:
                    self.cache.insert(source.key, encoded.rows)
        return [_reduced(image, rows[source.handle]) for image, source in zip(images, sources, strict=True)]

    def _known_rows(self, image: VisualInput) -> Tensor | None:
        if image.embeds is not None:
            return image.embeds.to(self._dtype)
        return None if self.cache is None else self.cache.find(image.key)


def _reduced(image: VisualInput, rows: Tensor | None) -> ImageResult:
    assert rows is not None, "every image has been encoded"
    before = image.before_llm
    if before is None:
        return ImageResult(rows)
    source = before.source
    return ImageResult(*reduce_image(rows, before.step, source.segments, image.source_newlines, before.known))
