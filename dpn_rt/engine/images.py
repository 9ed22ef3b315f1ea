"""Decoder rows of images: given by the user, known from before, or from the vision encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpn_rt.cache.image_cache import ImageCache
from dpn_rt.model.vision.encoder import VisionEncoder
from dpn_rt.model.vision.visual_input import VisualInput


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

    def encode(self, images: Sequence[VisualInput]) -> list[Tensor]:
        """`[num_visual_tokens, hidden_size]` of each image."""
        rows = {image.key: self._known_rows(image) for image in images}
        new = {image.key: image for image in images if rows[image.key] is None}
        if new:
            assert self.encoder is not None, "the processor refuses images without an encoder"
            for key, encoded in zip(new, self.encoder.encode(list(new.values())), strict=True):
                rows[key] = encoded.rows
                if self.cache is not None:
                    self.cache.insert(key, encoded.rows)
        found = [rows[image.key] for image in images]
        assert all(row is not None for row in found)
        return found  # type: ignore[return-value]

    def _known_rows(self, image: VisualInput) -> Tensor | None:
        if image.embeds is not None:
            return image.embeds.to(self._dtype)
        return None if self.cache is None else self.cache.find(image.key)
