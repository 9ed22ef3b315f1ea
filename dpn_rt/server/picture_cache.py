"""Image files that came before, ready for the vision tower: asked about again, they are not decoded again."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

from dpn_rt.cache.lru_cache import LruCache
from dpn_rt.model.vision.visual_input import VisualInput


class PictureCache:
    """Keyed by the hash of the file's bytes. Safe to call from several threads."""

    def __init__(self, max_bytes: int) -> None:
        """Args: max_bytes: of pixels, at most; 0 keeps nothing."""
        self._pictures = LruCache[VisualInput](max_bytes, size_of=lambda picture: picture.nbytes)
        self._lock = threading.Lock()

    @property
    def queries(self) -> int:
        return self._pictures.queries

    @property
    def hits(self) -> int:
        return self._pictures.hits

    def get(self, file: bytes, process: Callable[[bytes], VisualInput]) -> VisualInput:
        """The image of a file's bytes; `process` makes it if it is not known, and what that raises is not kept."""
        key = hashlib.blake2b(file, digest_size=32).digest()
        with self._lock:
            known = self._pictures.find(key)
        if known is not None:
            return known
        picture = process(file)
        with self._lock:
            self._pictures.insert(key, picture)
        return picture
