"""Random boundaries, and a reference that follows every row through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
Array = npt.NDArray[np.int32] | npt.NDArray[np.float32]

KERNELS = np.array([[1, 1], [1, 2], [2, 2], [4, 1]], dtype=np.int32)
MIN_VISUAL_TOKENS = 16
MODES = ["router", "forced", "static"]
NO_EXPERT = -1


@dataclass(frozen=True)
class Image:
    start: int
    grid: tuple[int, int]

    @property
    def rows(self) -> list[int]:
        return list(range(self.start, self.start + self.grid[0] * self.grid[1]))

    def pooled_grid(self, expert: int) -> tuple[int, int]:
        height, width = (1, 1) if expert == NO_EXPERT else KERNELS[expert].tolist()
        return self.grid[0] // height, self.grid[1] // width


@dataclass(frozen=True)
class Rows:
    """The rows of one sequence."""

    length: int
    images: tuple[Image, ...]
    router_rows: tuple[int, ...]
    first_position: int
    first_cache_row: int

    def pooled(self, experts: Sequence[int]) -> Rows:
        """The rows that remain; the first rows of an image take the place of its pooled ones."""
        grids = [image.pooled_grid(expert) for image, expert in zip(self.images, experts, strict=True)]
        dropped = {
            row
            for image, (height, width) in zip(self.images, grids, strict=True)
            for row in image.rows[height * width :]
        }
        left = [row for row in range(self.length) if row not in dropped]
        images = [Image(left.index(image.start), grid) for image, grid in zip(self.images, grids, strict=True)]
        router_rows = tuple(left.index(row) for row in self.router_rows)
        return Rows(len(left), tuple(images), router_rows, self.first_position, self.first_cache_row)


@dataclass(frozen=True)
class Case:
    """One batch before a boundary; `routed` and `probs` are None without a router."""

    sequences: tuple[Rows, ...]
    routed: IntArray | None
    probs: npt.NDArray[np.float32] | None
    forced: IntArray | None

    @property
    def num_rows(self) -> int:
        return sum(sequence.length for sequence in self.sequences)

    def layout(self) -> dict[str, IntArray]:
        """The layout, by the names of `ops.DeviceLayout`; positions and cache rows are not read."""
        first = {
            "first_positions": np.array([s.first_position for s in self.sequences], dtype=np.int32),
            "first_cache_rows": np.array([s.first_cache_row for s in self.sequences], dtype=np.int32),
        }
        offsets = {
            "cu_images": _offsets([len(s.images) for s in self.sequences]),
            "cu_router_rows": _offsets([len(s.router_rows) for s in self.sequences]),
        }
        return first | offsets | _moved(self.sequences)

    def expected(self) -> dict[str, Array]:
        """Expected outputs by the names of `ops.Advance` and `ops.DeviceLayout`, in the order of the extension."""
        chosen = [self._chosen(b, image) for b, s in enumerate(self.sequences) for image in s.images]
        experts = [e for s in self.experts() for e in s]
        sequences = [s.pooled(e) for s, e in zip(self.sequences, self.experts(), strict=True)]
        owners = [b for b, s in enumerate(self.sequences) for _ in s.images]
        scales = np.ones(len(owners), dtype=np.float32)
        if self.probs is not None:
            scales[:] = [self.probs[b, max(expert, 0)] for b, expert in zip(owners, chosen, strict=True)]
        return {
            "chosen": np.array(chosen, dtype=np.int32),
            "experts": np.array(experts, dtype=np.int32),
            "scales": scales,
            **_moved(sequences),
            "positions": self._numbered([(s.first_position, s.length) for s in sequences]),
            "cache_rows": self._numbered([(s.first_cache_row, s.length) for s in sequences]),
        }

    def experts(self) -> list[list[int]]:
        """Per sequence and image, the expert for `pool`."""
        return [[self._expert(b, image) for image in s.images] for b, s in enumerate(self.sequences)]

    def _chosen(self, b: int, image: Image) -> int:
        if len(image.rows) < MIN_VISUAL_TOKENS:
            return NO_EXPERT
        if self.forced is not None and self.forced[b] >= 0:
            return int(self.forced[b])
        return 0 if self.routed is None else max(int(self.routed[b]), 0)

    def _expert(self, b: int, image: Image) -> int:
        chosen = self._chosen(b, image)
        is_too_large = chosen != NO_EXPERT and any(k > n for k, n in zip(KERNELS[chosen], image.grid, strict=True))
        return NO_EXPERT if is_too_large else chosen

    def _numbered(self, runs: list[tuple[int, int]]) -> IntArray:
        rows = [row for first, length in runs for row in range(first, first + length)]
        return np.array(rows + [0] * (self.num_rows - len(rows)), dtype=np.int32)


def _moved(sequences: Sequence[Rows]) -> dict[str, IntArray]:
    """The parts of a layout that a boundary changes."""
    cu_seqlens = _offsets([s.length for s in sequences])
    router_rows = [int(cu_seqlens[b]) + row for b, s in enumerate(sequences) for row in s.router_rows]
    return {
        "cu_seqlens": cu_seqlens,
        "image_starts": np.array([image.start for s in sequences for image in s.images], dtype=np.int32),
        "grids": np.array([image.grid for s in sequences for image in s.images], dtype=np.int32).reshape(-1, 2),
        "router_rows": np.array(router_rows, dtype=np.int32),
    }


def _offsets(counts: list[int]) -> IntArray:
    return np.array([0, *counts], dtype=np.int32).cumsum(dtype=np.int32)


def random_rows(random: np.random.Generator, max_images: int) -> Rows:
    """A sequence of images with text, possibly none, around them; grids near every threshold."""
    length, text, images = 0, [], []
    for _ in range(random.integers(0, max_images + 1)):
        before = int(random.integers(0, 4))
        text += range(length, length + before)
        grid = int(random.integers(1, 8)), int(random.integers(1, 8))
        images.append(Image(length + before, grid))
        length += before + grid[0] * grid[1]
    after = int(random.integers(0, 6))
    text += range(length, length + after)
    count = min(len(text), int(random.integers(0, 3)))
    routers = sorted(int(row) for row in random.choice(text, count, replace=False)) if count else []
    first_cache_row = int(random.integers(0, 4))
    return Rows(
        length + after, tuple(images), tuple(routers), first_cache_row + int(random.integers(0, 9)), first_cache_row
    )


def random_case(random: np.random.Generator, num_seqs: int, mode: str, max_images: int = 4) -> Case:
    """Sequences of text, with one image and with several; grids near the thresholds; kernels that are too large."""
    sequences = tuple(random_rows(random, max_images) for _ in range(num_seqs))
    forced = random.integers(-1, len(KERNELS), num_seqs).astype(np.int32) if mode == "forced" else None
    if mode == "static":
        return Case(sequences, None, None, forced)
    probs = random.random((num_seqs, len(KERNELS))).astype(np.float32)
    has_router = np.array([bool(s.router_rows) for s in sequences], dtype=np.bool_)
    return Case(sequences, np.where(has_router, probs.argmax(1), -1).astype(np.int32), probs, forced)
