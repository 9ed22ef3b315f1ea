"""Segments of scores and what is kept of them, and batches of rows: for the CPU's tests and the emulated GPU's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SIZES = [0, 1, 15, 16, 17, 255, 256, 257, 575, 576, 2880]
# Segments of many sizes, each with none, one, half, all but one and all of its scores kept.
MIXED = [(size, kept) for size in SIZES for kept in sorted({0, min(1, size), size // 2, max(0, size - 1), size})]


def int32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def offsets(counts: list[int]) -> Tensor:
    return torch.tensor(np.cumsum([0, *counts]).tolist(), dtype=torch.int32)


def expected_top_k(scores: np.ndarray, segments: list[tuple[int, int]]) -> list[int]:
    """By numpy's stable sort. segments: scores and how many of them are kept."""
    kept, first = [], 0
    for size, count in segments:
        # NaN sorts as the smallest, below -infinity.
        part = scores[first : first + size].astype(np.float64)
        is_nan = np.isnan(part)
        order = np.lexsort((np.arange(size), -np.where(is_nan, 0, part), is_nan))
        kept += sorted(order[:count].tolist())
        first += size
    return kept


@dataclass(frozen=True)
class Image:
    before: int  # rows of text between it and the image before, or the start of the sequence
    rows: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """One sequence: images, each after some text, and text at the end."""

    images: tuple[Image, ...]
    after: int

    @property
    def length(self) -> int:
        return sum(image.before + image.rows for image in self.images) + self.after

    @property
    def starts(self) -> list[int]:
        ends = np.cumsum([0, *(image.before + image.rows for image in self.images)])
        return [int(end) + image.before for end, image in zip(ends, self.images, strict=False)]

    @property
    def stays(self) -> list[int]:
        """Rows that stay, one by one."""
        dropped = {
            start + row
            for start, image in zip(self.starts, self.images, strict=True)
            for row in set(range(image.rows)) - set(image.kept)
        }
        return [row for row in range(self.length) if row not in dropped]


def text(rows: int) -> Sample:
    return Sample((), rows)


def random_image(generator: np.random.Generator, rows: int, kept: int, before: int = 3) -> Image:
    return Image(before, rows, tuple(sorted(generator.choice(rows, kept, replace=False).tolist()) if rows else ()))


def row_arguments(samples: list[Sample]) -> dict[str, Tensor]:
    images = [image for sample in samples for image in sample.images]
    return {
        "cu_seqlens": offsets([sample.length for sample in samples]),
        "cu_images": offsets([len(sample.images) for sample in samples]),
        "image_starts": int32([start for sample in samples for start in sample.starts]),
        "image_lengths": int32([image.rows for image in images]),
        "kept": int32([row for image in images for row in image.kept]),
        "cu_kept": offsets([len(image.kept) for image in images]),
        "out_cu_seqlens": offsets([len(sample.stays) for sample in samples]),
    }


def expected_rows(samples: list[Sample]) -> list[int]:
    rows, first = [], 0
    for sample in samples:
        rows += [first + row for row in sample.stays]
        first += sample.length
    return rows


def ragged(generator: np.random.Generator) -> list[Sample]:
    """Sequences with none, one and several images, next to each other and at both ends, kept 0 and kept all."""

    def image(rows: int, kept: int, before: int = 3) -> Image:
        return random_image(generator, rows, kept, before)

    return [
        text(4), Sample((image(576, 288, 35),), 25), Sample((image(5, 2, 0), image(6, 6, 0)), 0), text(0),
        Sample((image(4, 0, 0),), 0), Sample((image(0, 0), image(17, 1), image(9, 0, 0), image(1, 1)), 2), text(1),
        Sample(tuple(image(rows, rows // 2, rows % 3) for rows in range(9)), 4), Sample((image(2880, 720),), 60),
    ]  # fmt: skip


def new_random() -> np.random.Generator:
    """Random numbers by the seed that is printed when a test fails."""
    return np.random.default_rng(torch.initial_seed())


def hard_scores(generator: np.random.Generator, size: int) -> np.ndarray:
    """Ties, both zeros, infinities, NaN of both signs, subnormal and neighbouring numbers."""
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 1.0, np.nextafter(np.float32(1), 2), -2.5])
    special = np.concatenate([special, -special[4:5]]).astype(np.float32)
    few = generator.integers(0, 5, size).astype(np.float32) / 4
    smooth = generator.random(size, dtype=np.float32) / 600
    kind = generator.integers(0, 3, size)
    return np.choose(kind, [generator.choice(special, size), few, smooth]).astype(np.float32)
