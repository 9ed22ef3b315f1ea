"""A boundary of the pyramid: route each sample, pool its visual tokens, return the rows and layout of the next stage.

The only module that changes sequence lengths. Behaviour as published (DPN, arXiv 2503.20322, section 3): a sample with
fewer than 16 visual tokens, or fewer than the largest kernel covers, stays as it is. A sample whose chosen kernel is
higher or wider than its grid fails, and the others of the batch do not notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.config import MIN_VISUAL_TOKENS, BoundaryConfig, PyramidConfig
from dpn_rt.layout import IntArray, Layout

ROUTER_NORM_EPS = 1e-5
ROUTER_TEMPERATURE = 10.0
"""What the router's logits are divided by before the softmax; `ops.route` has it built in."""
SKIPPED = -1
"""Expert of a sample that a boundary left untouched."""
UNFORCED = -1
"""Forced expert of a sample whose router decides."""


@dataclass(frozen=True)
class BoundaryTrace:
    """What a boundary did."""

    experts: IntArray
    """`[num_seqs]` expert taken, -1 where skipped."""
    probs: npt.NDArray[np.float32] | None
    """`[num_seqs, num_experts]` probabilities of the router; None where no router runs."""
    misfits: npt.NDArray[np.bool_]
    """`[num_seqs]` the kernel of the expert is higher or wider than the grid. The sample was left untouched; what is
    computed from it further on means nothing."""

    def select(self, kept: npt.NDArray[np.intp]) -> BoundaryTrace:
        """Of these sequences alone."""
        probs = None if self.probs is None else self.probs[kept]
        return BoundaryTrace(self.experts[kept], probs, self.misfits[kept])


@dataclass(frozen=True)
class Router:
    """Weights of a router, float32; `norm_weight`, `norm_bias` and `hidden_weight` are None for version 2."""

    predictor: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    hidden_weight: Tensor | None


class Boundary:
    """Routing and pooling on the output of one decoder layer."""

    def __init__(self, config: PyramidConfig, index: int, weights: Mapping[str, Tensor]) -> None:
        """Takes `boundaries.{index}.*` from an engine's weights."""
        boundary = config.boundaries[index]
        prefix = f"boundaries.{index}"
        self._function = config.pooling_function
        self._kernels = np.asarray(boundary.kernels, dtype=np.int32)
        self._levels = compression_levels(boundary)
        self._min_visual_tokens = min_visual_tokens(boundary)
        self._router: Router | None = None
        if config.pooling_type == "adaptive":
            self._router = Router(
                predictor=weights[f"{prefix}.router.predictor.weight"],
                norm_weight=weights.get(f"{prefix}.router.norm.weight"),
                norm_bias=weights.get(f"{prefix}.router.norm.bias"),
                hidden_weight=weights.get(f"{prefix}.router.hidden.weight"),
            )
        self._conv_weights: list[Tensor] | None = None
        if config.pooling_function == "conv":
            self._conv_weights = [weights[f"{prefix}.experts.{e}.weight"] for e in range(boundary.num_experts)]

    def apply(
        self, x: Tensor, layout: Layout, forced: IntArray, biases: npt.NDArray[np.float64] | None = None
    ) -> tuple[Tensor, Layout, BoundaryTrace]:
        """Rows and layout of the next stage.

        Args:
            x: `[num_rows, hidden_size]` output of the pooling layer, before any norm.
            layout: of `x`.
            forced: `[num_seqs]` expert to take, -1 where the router decides. Without a router every sample that is
                not skipped needs one, except that a single expert needs no choice.
            biases: `[num_seqs]` added to the router's logits per level of compression; None for none.
        """
        skipped = layout.num_visual < self._min_visual_tokens
        probs: npt.NDArray[np.float32] | None = None
        scales: Tensor | None = None
        if self._router is None:
            chosen = np.maximum(forced, 0)
        else:
            routed, probs = self._route(x, layout)
            if biases is not None and biases.any():
                probs = biased(probs, self._levels, biases)
                routed = probs.argmax(axis=1).astype(np.int32)
            chosen = np.maximum(np.where(forced == UNFORCED, routed, forced), 0)
            scales = torch.from_numpy(np.take_along_axis(probs, chosen[:, None], axis=1)[:, 0])
        pooled_grids = layout.grids // self._kernels[chosen]
        misfits = ~skipped & (pooled_grids.min(axis=1) == 0)
        untouched = skipped | misfits
        trace = BoundaryTrace(np.where(skipped, SKIPPED, chosen).astype(np.int32), probs, misfits)
        if untouched.all():
            return x, layout, trace
        pooled = layout.pooled(np.where(untouched[:, None], layout.grids, pooled_grids).astype(np.int32))
        experts = np.where(untouched, SKIPPED, chosen).astype(np.int32)
        rows = ops.pool(
            x,
            torch.from_numpy(layout.cu_seqlens),
            torch.from_numpy(layout.image_start),
            torch.from_numpy(layout.grids),
            torch.from_numpy(experts),
            torch.from_numpy(self._kernels),
            torch.from_numpy(pooled.cu_seqlens),
            scales=scales,
            function=self._function,
            conv_weights=self._conv_weights,
        )
        return rows, pooled, trace

    def _route(self, x: Tensor, layout: Layout) -> tuple[IntArray, npt.NDArray[np.float32]]:
        assert self._router is not None
        probs, experts = ops.route(
            x,
            torch.from_numpy(layout.packed_router_rows),
            torch.from_numpy(layout.cu_router_rows),
            self._router.predictor,
            norm_weight=self._router.norm_weight,
            norm_bias=self._router.norm_bias,
            hidden_weight=self._router.hidden_weight,
            eps=ROUTER_NORM_EPS,
        )
        return experts.numpy(), probs.numpy()


def biased(
    probs: npt.NDArray[np.float32], levels: IntArray, biases: npt.NDArray[np.float64]
) -> npt.NDArray[np.float32]:
    """The probabilities `[num_seqs, num_experts]` that a router gives with `bias * level` added to each logit.

    Args:
        probs: `[num_seqs, num_experts]` without it; all 0 where no router ran, and so they stay.
        levels: `[num_experts]` level of compression of each expert.
        biases: `[num_seqs]`.
    """
    shift = np.outer(biases, levels) / ROUTER_TEMPERATURE
    weighted = probs * np.exp(shift - shift.max(axis=1, keepdims=True))
    total = weighted.sum(axis=1, keepdims=True)
    result: npt.NDArray[np.float32] = (weighted / np.where(total > 0, total, 1)).astype(np.float32)
    return result


def compression_levels(boundary: BoundaryConfig) -> IntArray:
    """`[num_experts]`: 0 for the smallest kernel area, 1 for the next larger one, and so on."""
    areas = np.prod(boundary.kernels, axis=1)
    levels: IntArray = np.searchsorted(np.unique(areas), areas).astype(np.int32)
    return levels


def min_visual_tokens(boundary: BoundaryConfig) -> int:
    """Visual tokens from which on this boundary pools a sample."""
    return max(MIN_VISUAL_TOKENS, boundary.largest_area)


def longest_lengths(
    config: PyramidConfig, num_rows: int, grid: tuple[int, int] | None, forced: list[int]
) -> tuple[int, ...]:
    """Rows that a sequence has at most in each stage: exact while the experts are known beforehand.

    Args:
        config: of the model.
        num_rows: rows at stage 0.
        grid: of the visual tokens at stage 0, None without an image.
        forced: expert per boundary, -1 where the router decides.
    """
    lengths = [num_rows]
    for boundary, expert in zip(config.boundaries, forced, strict=True):
        known = 0 if boundary.num_experts == 1 else expert
        if grid is not None and known == UNFORCED:
            grid = None  # behind a boundary that is open, any grid is possible: count no more pooling
        if grid is not None:
            height, width = grid
            kernel = boundary.kernels[known]
            fits = height >= kernel[0] and width >= kernel[1]
            if height * width >= min_visual_tokens(boundary) and fits:
                grid = height // kernel[0], width // kernel[1]
                num_rows -= height * width - grid[0] * grid[1]
        lengths.append(num_rows)
    return tuple(lengths)
