"""DPN's pooling as a configuration: boundaries, experts, weights, and the rule of what a kernel leaves of a grid.

Behaviour as published (DPN, arXiv 2503.20322, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch

from dpn_rt.model.reduction.choice import UNFORCED, Choice
from dpn_rt.model.reduction.grid import Grid, IntArray, Segments, as_grid, num_visual, pooled_grid, pooled_grids
from dpn_rt.model.reduction.reduction import Asked
from dpn_rt.schema.bounds import FEW, Side
from dpn_rt.schema.weights import NamedSpecs, WeightSpec

PoolingType = Literal["adaptive", "static", "random"]
PoolingFunction = Literal["max", "avg", "conv"]
RouterVersion = Literal["v1", "v2"]

BOUNDARIES = "boundaries"
ROUTER_NORM, ROUTER_HIDDEN, ROUTER_PREDICTOR = "norm", "hidden", "predictor"
"""Parts of a router."""

MIN_VISUAL_TOKENS = 16
"""A boundary skips an image with fewer visual tokens."""
SKIPPED = -1
"""Expert of an image that a boundary skips."""


@dataclass(frozen=True)
class BoundaryConfig:
    """Routing and pooling on the output of decoder layer `layer`."""

    layer: int
    kernels: Annotated[tuple[tuple[Side, Side], ...], FEW]
    """(kernel height, kernel width) per expert; stride equals kernel."""

    @property
    def num_experts(self) -> int:
        return len(self.kernels)

    @property
    def min_visual_tokens(self) -> int:
        """Visual tokens from which on an image is pooled: 16, or as many as the largest kernel covers."""
        return max(MIN_VISUAL_TOKENS, *(height * width for height, width in self.kernels))

    @property
    def compression_levels(self) -> IntArray:
        """`[num_experts]`: 0 for the smallest kernel area, 1 for the next larger one, and so on."""
        areas = np.prod(self.kernels, axis=1)
        levels: IntArray = np.searchsorted(np.unique(areas), areas).astype(np.int32)
        return levels

    def choose(self, grids: IntArray, experts: IntArray) -> IntArray:
        """`[num_images]` experts as the boundary takes them: -1 where it skips the image.

        Args:
            grids: `[num_images, 2]`, (0, 0) without an image.
            experts: `[num_images]` wanted.
        """
        return np.where(grids[:, 0] * grids[:, 1] >= self.min_visual_tokens, experts, SKIPPED).astype(np.int32)

    def pooled(self, grids: IntArray, chosen: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        """Grids after the boundary, and where the kernel is too large for the grid and leaves it as it is.

        Args:
            grids: `[num_images, 2]`.
            chosen: `[num_images]` experts, -1 where skipped.

        Returns:
            `[num_images, 2]` int32 and `[num_images]` bool.
        """
        kernels = np.asarray(self.kernels, dtype=np.int32)
        after, fits = pooled_grids(grids, kernels[np.maximum(chosen, 0)])
        is_pooled = (chosen != SKIPPED) & fits
        return np.where(is_pooled[:, None], after, grids).astype(np.int32), (chosen != SKIPPED) & ~fits

    def grid_after(self, grid: Grid, expert: int) -> Grid:
        """As `choose` and `pooled`, for one image; admission asks for every request, so without arrays."""
        if grid[0] * grid[1] < self.min_visual_tokens:
            return grid
        after, fits = pooled_grid(grid, self.kernels[expert])
        return after if fits else grid


@dataclass(frozen=True)
class PoolingConfig:
    """Visual tokens are pooled by an expert that a router picks (adaptive), the only one (static), or a drawn one
    (random)."""

    boundaries: Annotated[tuple[BoundaryConfig, ...], FEW]
    pooling_type: PoolingType = "adaptive"
    pooling_function: PoolingFunction = "max"
    router_version: RouterVersion = "v1"
    use_router_token: bool = False
    """Route on the rows of `<ROUTER>` tokens; otherwise on the last row of the prompt."""
    method: Literal["dpn"] = "dpn"

    @property
    def summary(self) -> str:
        return f"{self.pooling_type} pooling"

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(boundary.layer for boundary in self.boundaries)

    @property
    def needs_grid(self) -> bool:
        return True

    @property
    def num_experts(self) -> tuple[int, ...]:
        return tuple(boundary.num_experts for boundary in self.boundaries)

    @property
    def reads_router_rows(self) -> bool:
        return self.pooling_type == "adaptive"

    def weight_specs(self, hidden_size: int, dtype: torch.dtype) -> NamedSpecs:
        """Routers, which stay in float32 (bfloat16 moves the probabilities by 1e-3), and convolution experts."""
        for index, boundary in enumerate(self.boundaries):
            if self.pooling_type == "adaptive":
                yield from self._router(index, boundary, hidden_size)
            if self.pooling_function == "conv":
                for expert, (height, width) in enumerate(boundary.kernels):  # row ky * width + kx
                    yield f"{expert_module(index, expert)}.weight", WeightSpec((height * width, hidden_size), dtype)

    def problems(self, hidden_size: int, grid: Grid | None) -> Iterator[str]:
        """Kernels that make no sense, or fit none of the grids that can reach their boundary."""
        found = list(self._kernel_problems())
        if self.router_version == "v1" and hidden_size % 4:
            found.append(f"a v1 router needs a hidden size that is a multiple of 4, got {hidden_size}")
        yield from found
        if grid is not None and not found:
            yield from self._unfit_kernels(grid)

    def choices(self, asked: Asked, seed: int | None) -> Sequence[Choice]:
        """Experts as the request asks, drawn for random pooling, else left to the router."""
        route = asked.route or (None,) * len(self.boundaries)
        drawn = [UNFORCED] * len(route)
        if self.pooling_type == "random":
            seed = None if seed is None else seed % 2**64  # numpy takes no negative seed
            drawn = [int(expert) for expert in np.random.default_rng(seed).integers(self.num_experts)]
        return [Choice(d if expert is None else expert) for expert, d in zip(route, drawn, strict=True)]

    def most_rows(self, num_rows: int, images: Sequence[Segments], choices: Sequence[Choice]) -> tuple[int, ...]:
        """See `Reduction`. After a boundary whose choice is open any grid is possible: no more pooling is counted."""
        rows = [num_rows]
        grids = tuple(map(as_grid, images))
        for boundary, choice in zip(self.boundaries, choices, strict=True):
            known = 0 if boundary.num_experts == 1 else choice.expert
            if known == UNFORCED:
                grids = ()
            after = tuple(boundary.grid_after(grid, known) for grid in grids)
            rows.append(rows[-1] - num_visual(grids) + num_visual(after))
            grids = after
        return tuple(rows)

    def _router(self, index: int, boundary: BoundaryConfig, hidden: int) -> NamedSpecs:
        def weight(part: str, *shape: int, kind: str = "weight") -> tuple[str, WeightSpec]:
            return f"{router_module(index, part)}.{kind}", WeightSpec(shape, torch.float32)

        if self.router_version == "v2":
            yield weight(ROUTER_PREDICTOR, boundary.num_experts, hidden)
            return
        yield weight(ROUTER_NORM, hidden)
        yield weight(ROUTER_NORM, hidden, kind="bias")
        yield weight(ROUTER_HIDDEN, hidden // 4, hidden)
        yield weight(ROUTER_PREDICTOR, boundary.num_experts, hidden // 4)

    def _kernel_problems(self) -> Iterator[str]:
        for boundary in self.boundaries:
            if not boundary.kernels:
                yield f"pooling layer {boundary.layer} has no kernels"
            if self.pooling_type == "static" and len(boundary.kernels) != 1:
                yield f"pooling layer {boundary.layer}: static pooling has one kernel, got {list(boundary.kernels)}"

    def _unfit_kernels(self, grid: Grid) -> Iterator[str]:
        """A kernel that fits none of the grids that can reach its boundary would never pool: the checkpoint is wrong.

        One that fits some of them is left to the request, whose route decides.
        """
        reachable = {grid}
        for boundary in self.boundaries:
            for kernel in boundary.kernels:
                if not any(pooled_grid(grid, kernel)[1] for grid in reachable):
                    sizes = ", ".join(f"{height}x{width}" for height, width in sorted(reachable, reverse=True))
                    where = f"pooling layer {boundary.layer}: kernel {list(kernel)}"
                    yield f"{where} does not fit the visual grid ({sizes})"
            grids = np.asarray(sorted(reachable), dtype=np.int32)
            after: set[Grid] = set()
            for expert in range(boundary.num_experts):
                left, too_large = boundary.pooled(grids, boundary.choose(grids, np.full(len(grids), expert)))
                after |= {(int(height), int(width)) for height, width in left[~too_large]}
            reachable = after or reachable


def router_module(boundary: int, part: str) -> str:
    """Canonical name of a part of a boundary's router."""
    return f"{BOUNDARIES}.{boundary}.router.{part}"


def expert_module(boundary: int, expert: int) -> str:
    """Canonical name of one of a boundary's convolutions."""
    return f"{BOUNDARIES}.{boundary}.experts.{expert}"
