"""Decoder rows of images that have been encoded before, by the hash of their content."""

from __future__ import annotations

from torch import Tensor

from dpn_rt.cache.lru_cache import LruCache


class ImageCache(LruCache[Tensor]):
    """Decoder rows `[num_visual_tokens, hidden_size]` of images; the least recently used are dropped first."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, size_of=lambda rows: rows.nbytes)

    def insert(self, key: bytes, value: Tensor) -> None:
        """Keeps a copy of `[num_visual_tokens, hidden_size]` rows."""
        if key not in self:
            super().insert(key, value.clone())  # a view would keep its whole batch alive
