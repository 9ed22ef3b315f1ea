"""Rows of images that have been through the vision tower, by the hash of their content."""

from __future__ import annotations

from torch import Tensor

from dpn_rt.lru_cache import LruCache


class ImageCache:
    """Decoder rows `[num_visual_tokens, hidden_size]`; least recently used ones leave first."""

    def __init__(self, max_bytes: int) -> None:
        self._rows: LruCache[Tensor] = LruCache(max_bytes)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        return self._rows.num_bytes

    @property
    def queries(self) -> int:
        return self._rows.queries

    @property
    def hits(self) -> int:
        return self._rows.hits

    def find(self, key: bytes) -> Tensor | None:
        """Rows of an image, None if they are not there."""
        return self._rows.find(key)

    def insert(self, key: bytes, rows: Tensor) -> None:
        """Keeps a copy of rows."""
        if key not in self._rows:
            self._rows.insert(key, rows.clone(), rows.nbytes)  # a view would keep its whole batch alive
