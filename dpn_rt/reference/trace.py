"""The layout of one sample's rows in a stage, and the record of what the boundaries did with the sample."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SampleLayout:
    """Rows of one sample in one stage: text before the image, visual rows in row-major order, text after it."""

    num_rows: int
    image_start: int
    """Index of the first visual row; 0 without an image."""
    grid: tuple[int, int] | None
    """Rows and columns of visual tokens, None without an image."""
    router_rows: tuple[int, ...]
    """Indices of the rows whose mean the router reads."""

    @property
    def num_visual(self) -> int:
        """Number of visual rows, 0 without an image."""
        return 0 if self.grid is None else self.grid[0] * self.grid[1]

    @property
    def image_end(self) -> int:
        """One past the last visual row."""
        return self.image_start + self.num_visual

    def with_grid(self, grid: tuple[int, int]) -> SampleLayout:
        """The layout after the image was pooled to `grid`: the rows after the image move up."""
        removed = self.num_visual - grid[0] * grid[1]
        num_rows = self.num_rows - removed
        # A router row comes after the image, or is the last row of a prompt that ends with the image.
        rows = tuple(row - removed if row >= self.image_end else num_rows - 1 for row in self.router_rows)
        return dataclasses.replace(self, num_rows=num_rows, grid=grid, router_rows=rows)


@dataclass(frozen=True)
class BoundaryRecord:
    """What one boundary did with one sample."""

    expert: int | None
    """Expert taken; None: the boundary skipped the sample."""
    kernel: tuple[int, int] | None
    probs: torch.Tensor | None
    """[num_experts] float32, with a gradient in training; None where no router ran."""
    scores: tuple[int, ...]
    """Rank of each expert by compression, for the routing loss."""


@dataclass(frozen=True)
class PyramidTrace:
    """What all boundaries did with one sample; has the same fields as the runtime's `output.pyramid`."""

    records: tuple[BoundaryRecord, ...]
    visual_tokens: tuple[int, ...]
    """Visual rows per stage."""
    kv_lengths: tuple[int, ...]
    """Rows per stage after prefill; every layer of the stage caches that many."""
    grids: tuple[tuple[int, int] | None, ...]
    """(rows, columns) of the visual tokens per stage; None without an image."""

    @property
    def experts(self) -> tuple[int | None, ...]:
        """Expert per boundary, None where the boundary was skipped."""
        return tuple(record.expert for record in self.records)

    @property
    def kernels(self) -> tuple[tuple[int, int] | None, ...]:
        """Kernel (height, width) per boundary, None where the boundary was skipped."""
        return tuple(record.kernel for record in self.records)

    @property
    def probs(self) -> tuple[tuple[float, ...] | None, ...]:
        """Routing probabilities per boundary, None where no router ran."""
        return tuple(None if r.probs is None else tuple(r.probs.detach().tolist()) for r in self.records)
