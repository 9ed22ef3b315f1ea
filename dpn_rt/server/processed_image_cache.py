"""Images as they were prepared for the vision encoder, so that a file that comes again is not decoded again."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

from dpn_rt.cache.lru_cache import LruCache
from dpn_rt.model.vision.visual_input import VisualInput


class ProcessedImageCache:
    """Prepared images by the SHA-256 of their file's bytes. Safe to use from several threads."""

    def __init__(self, max_bytes: int) -> None:
        """Args: max_bytes: of pixels; 0 keeps nothing."""
        self._images = LruCache[VisualInput](max_bytes, size_of=lambda image: image.nbytes)
        self._lock = threading.Lock()

    @property
    def queries(self) -> int:
        return self._images.queries

    @property
    def hits(self) -> int:
        return self._images.hits

    def get(self, file: bytes, process: Callable[[bytes], VisualInput], *, among_others: bool = False) -> VisualInput:
        """The prepared image of a file. `process` makes it if it is not kept; what `process` raises is raised again.

        Args:
            file: its bytes.
            process: makes the prepared image.
            among_others: the prompt has several images, see `Processor.image`.
        """
        digest = hashlib.sha256(b"among others " if among_others else b"alone ")
        digest.update(file)
        key = digest.digest()
        with self._lock:
            known = self._images.find(key)
        if known is not None:
            return known
        image = process(file)
        with self._lock:
            self._images.insert(key, image)
        return image
