"""Rows of images that have been through the vision tower, by the hash of their content."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


class ImageCache:
    """Least recently used rows leave first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()
        self.num_bytes = 0
        self.queries = 0
        self.hits = 0

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, key: bytes) -> Tensor | None:
        """`[num_visual_tokens, hidden_size]` of an image, None if they are not there."""
        self.queries += 1
        rows = self._rows.get(key)
        if rows is not None:
            self.hits += 1
            self._rows.move_to_end(key)
        return rows

    def insert(self, key: bytes, rows: Tensor) -> None:
        """Keeps a copy of rows, unless they alone are too large."""
        if key in self._rows or rows.nbytes > self._max_bytes:
            return
        self._rows[key] = rows.clone()  # a view would keep its whole batch alive
        self.num_bytes += rows.nbytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._rows.popitem(last=False)
            self.num_bytes -= oldest.nbytes
