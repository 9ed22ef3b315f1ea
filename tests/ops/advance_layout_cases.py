"""Random boundaries, and what the host makes of them (dpn_rt/model/layout.py, dpn_rt/model/pyramid.py)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpn_rt.model.layout import IntArray, Layout

KERNELS = np.array([[1, 1], [1, 2], [2, 2], [4, 1]], dtype=np.int32)
MIN_VISUAL_TOKENS = 16
MODES = ["router", "forced", "static"]


@dataclass
class Prompt:
    num_rows: int
    image_start: int | None
    grid: tuple[int, int] | None
    router_rows: IntArray


@dataclass(frozen=True)
class Case:
    """One batch before a boundary; `routed` and `probs` are None without a router."""

    layout: Layout
    first_positions: IntArray
    routed: IntArray | None
    probs: npt.NDArray[np.float32] | None
    forced: IntArray | None

    @property
    def num_rows(self) -> int:
        return int(self.layout.cu_seqlens[-1])

    def expected(self) -> dict[str, npt.NDArray[np.int32] | npt.NDArray[np.float32]]:
        """By the names of `ops.Advance` and `ops.DeviceLayout`, as `pooled_grids` and `Layout.pooled` do it."""
        num_seqs = self.layout.num_seqs
        chosen = np.zeros(num_seqs, dtype=np.int32) if self.routed is None else np.maximum(self.routed, 0)
        if self.forced is not None:
            chosen = np.where(self.forced < 0, chosen, self.forced)
        scales = np.ones(num_seqs, dtype=np.float32)
        skipped = self.layout.num_visual < MIN_VISUAL_TOKENS
        if self.probs is not None:
            scales = np.take_along_axis(self.probs, np.where(skipped, 0, chosen)[:, None], 1)[:, 0]
        pooled_grids = self.layout.grids // KERNELS[chosen]
        untouched = skipped | (pooled_grids.min(1, initial=2**30) == 0)
        pooled = self.layout.pooled(np.where(untouched[:, None], self.layout.grids, pooled_grids).astype(np.int32))
        return {
            "chosen": np.where(skipped, -1, chosen),
            "experts": np.where(untouched, -1, chosen),
            "scales": scales,
            "cu_seqlens": pooled.cu_seqlens,
            "grids": pooled.grids,
            "router_rows": pooled.router_rows_from(pooled.cu_seqlens),
            "positions": self._padded(
                pooled.positions + np.repeat(self.first_positions - pooled.first_rows, pooled.lengths)
            ),
            "cache_rows": self._padded(pooled.positions),
        }

    def _padded(self, rows: IntArray) -> IntArray:
        return np.pad(rows, (0, self.num_rows - len(rows)))


def random_prompt(random: np.random.Generator) -> Prompt:
    before, after = int(random.integers(4, 8)), int(random.integers(1, 6))
    if random.random() < 0.2:
        return Prompt(before + after, None, None, np.zeros(0, dtype=np.int32))
    grid = int(random.integers(1, 8)), int(random.integers(1, 8))
    rows = before + grid[0] * grid[1] + after
    routers = np.sort(random.integers(rows - after, rows, int(random.integers(1, 3)))).astype(np.int32)
    return Prompt(rows, before, grid, routers)


def random_case(random: np.random.Generator, num_seqs: int, mode: str) -> Case:
    """Text alone, grids below and above the thresholds, kernels that do not fit; rows before the batch's own."""
    prompts = [random_prompt(random) for _ in range(num_seqs)]
    layout = Layout.of_prompts(prompts, random.integers(0, 4, num_seqs).tolist())
    probs = random.random((num_seqs, len(KERNELS))).astype(np.float32)
    routed = np.where(np.diff(layout.cu_router_rows) > 0, probs.argmax(1), -1).astype(np.int32)
    forced = random.integers(-1, len(KERNELS), num_seqs).astype(np.int32) if mode == "forced" else None
    first_positions = (layout.first_rows + random.integers(0, 9, num_seqs)).astype(np.int32)
    return Case(
        layout, first_positions, None if mode == "static" else routed, None if mode == "static" else probs, forced
    )
