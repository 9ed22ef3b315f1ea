"""Rows of images that have been through the vision tower, by the hash of their content."""

from __future__ import annotations

from torch import Tensor

from dpn_rt.cache.lru_cache import LruCache


class ImageCache(LruCache[Tensor]):
    """Decoder rows `[num_visual_tokens, hidden_size]`; least recently used ones leave first."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, size_of=lambda rows: rows.nbytes)

    def insert(self, key: bytes, value: Tensor) -> None:
        """Keeps a copy of rows."""
        if key not in self:
            super().insert(key, value.clone())  # a view would keep its whole batch alive
