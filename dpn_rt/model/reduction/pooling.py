"""A boundary of the pyramid: route each sample, pool its visual tokens, return the rows and layout of the next stage.

The only module that changes sequence lengths. Behaviour as published (DPN, arXiv 2503.20322, section 3): a sample with
fewer than 16 visual tokens, or fewer than the largest kernel covers, stays as it is. A sample whose chosen kernel is
higher or wider than its grid fails, and the others of the batch do not notice.

What the routers choose is pooled where it was chosen, and the next layout is made there too; the host is told behind
that, in one reading per boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpn_rt import ops
from dpn_rt.device.device import Device, Reading
from dpn_rt.device.host import HostDevice
from dpn_rt.model.layout import IntArray, Layout
from dpn_rt.model.reduction.pooling_config import SKIPPED, BoundaryConfig, PoolingConfig
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.ops import Advance, DeviceLayout

ROUTER_NORM_EPS = 1e-5


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


@dataclass(frozen=True)
class Placed:
    """A batch where its rows are."""

    layout: DeviceLayout
    forced: Tensor
    """`[num_seqs]` int32 expert to take at the boundary, -1 where the router decides."""


class QueuedBoundary:
    """A boundary on its way on the device. What the host is told of it is waited for when it is asked for."""

    def __init__(self, advance: Advance, before: Layout, config: BoundaryConfig, news: Reading) -> None:
        """
        Args:
            advance: to the next stage; `[num_images]` of sequences with at most one image each.
            before: layout of the stage that ends here.
            config: of the boundary.
            news: the chosen experts, the next stage's offsets, and the probabilities where there is a router.
        """
        self.layout: DeviceLayout = advance.layout
        """Of the next stage."""
        self._before, self._config, self._reading = before, config, news

    @cached_property
    def _news(self) -> tuple[IntArray, IntArray, npt.NDArray[np.float32] | None]:
        of_images, cu_seqlens, *probs = self._reading.wait()
        chosen = np.full_like(self._before.lengths, SKIPPED)
        chosen[self._before.image_start >= 0] = of_images
        return chosen, cu_seqlens, probs[0] if probs else None

    @property
    def num_rows(self) -> int:
        """Of the next stage."""
        return int(self._news[1][-1])

    def finish(self) -> tuple[Layout, BoundaryTrace]:
        """The next stage's layout on the host, and what was done."""
        chosen, _, probs = self._news
        grids, misfits = self._config.pooled(self._before.grids, chosen)
        return self._before.pooled(grids), BoundaryTrace(chosen, probs, misfits)


def load_boundaries(
    config: PoolingConfig | NoReduction, weights: Mapping[str, Tensor], device: Device | None = None
) -> list[Boundary]:
    """The boundaries of a model, in order.

    Args:
        config: of the model.
        weights: of the engine, on `device`.
        device: of all tensors; None: the host.
    """
    if isinstance(config, NoReduction):
        return []
    return [Boundary(config, index, weights, device) for index in range(len(config.boundaries))]


class Boundary:
    """Routing and pooling on the output of one decoder layer."""

    def __init__(
        self, config: PoolingConfig, index: int, weights: Mapping[str, Tensor], device: Device | None = None
    ) -> None:
        """Takes `boundaries.{index}.*` from an engine's weights, which are on `device`; None: the host."""
        self._config = boundary = config.boundaries[index]
        prefix = f"boundaries.{index}"
        self._device = device or HostDevice()
        self._function = config.pooling_function
        kernels = np.asarray(boundary.kernels, dtype=np.int32)
        self._placed_kernels, self._levels = self._device.upload(kernels, compression_levels(boundary))
        self._min_visual_tokens = boundary.min_visual_tokens
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

    def queue(
        self,
        x: Tensor,
        layout: Layout,
        forced: IntArray,
        biases: npt.NDArray[np.float64] | None = None,
        placed: Placed | None = None,
    ) -> tuple[Tensor, QueuedBoundary] | None:
        """Routes and pools without a look at the choice.

        Args:
            x: `[num_rows, hidden_size]` output of the pooling layer, before any norm.
            layout: of `x`.
            forced: `[num_seqs]` expert to take, -1 where the router decides. Without a router every sample that is
                not skipped needs one, except that a single expert needs no choice.
            biases: `[num_seqs]` added to the router's logits per level of compression; None for none.
            placed: `layout` and `forced` where `x` is; None: they are sent there.

        Returns:
            The rows of the next stage, with anything behind the last, and what the host will be told; None where every
            sample is skipped.
        """
        if self._skips_all(layout):
            return None
        if placed is None:
            placed = self._place(x, layout, layout.cu_seqlens, forced)
        routed, probs = self._route(x, placed.layout, biases)
        advance = self._advance(placed, routed, probs)
        news = self._read(advance, probs)
        rows = self._pool(x, placed.layout, advance, probs, advance.layout.cu_seqlens)
        return rows, QueuedBoundary(advance, layout, self._config, news)

    def longest(self, layout: Layout, forced: IntArray) -> IntArray:
        """`[num_seqs]` rows that attention sees behind the boundary at most: as many as now where a router decides.

        Args:
            layout: before the boundary.
            forced: as in `queue`.
        """
        known = forced if self._router is not None else np.maximum(forced, 0)
        chosen = self._config.choose(layout.grids, known)  # UNFORCED counts as SKIPPED
        if (chosen == SKIPPED).all():
            return layout.kv_lengths
        grids, _ = self._config.pooled(layout.grids, chosen)
        return layout.kv_lengths - layout.num_visual + grids[:, 0] * grids[:, 1]

    def apply_padded(
        self, x: Tensor, layout: Layout, forced: IntArray, biases: npt.NDArray[np.float64] | None = None
    ) -> tuple[Tensor, Layout, BoundaryTrace]:
        """Rows, layout and trace of the next stage, of sequences that are padded to one length; so is what comes out.

        Here the host learns what was chosen before rows are pooled, since their new length is the longest sequence's.

        Args:
            x: `[num_seqs, longest, hidden_size]`, with anything behind each sequence.
            layout: of the packed rows.
            forced: as in `queue`.
            biases: as in `queue`.

        Returns:
            `[num_seqs, longest, hidden_size]`, zeros behind each sequence; `x` itself where all are skipped.
        """
        num_seqs, longest, hidden_size = x.shape
        if self._skips_all(layout):
            return x, layout, untouched(layout)
        rows = x.flatten(0, 1)
        sequences = np.arange(num_seqs + 1, dtype=np.int32)
        placed = self._place(rows, layout, sequences * np.int32(longest), forced)
        routed, probs = self._route(rows, placed.layout, biases)
        advance = self._advance(placed, routed, probs)
        pooled, trace = QueuedBoundary(advance, layout, self._config, self._read(advance, probs)).finish()
        width = int(pooled.lengths.max())
        out_offsets, lengths = self._device.upload(sequences * np.int32(width), layout.lengths)
        out = x.new_empty(num_seqs * width, hidden_size)
        self._pool(rows, placed.layout, advance, probs, out_offsets, lengths=lengths, out=out)
        return out.view(num_seqs, width, hidden_size), pooled, trace

    def _skips_all(self, layout: Layout) -> bool:
        return bool((layout.num_visual < self._min_visual_tokens).all())

    def _read(self, advance: Advance, probs: Tensor | None) -> Reading:
        return self._device.read(advance.chosen, advance.layout.cu_seqlens, *(() if probs is None else (probs,)))

    def _advance(self, placed: Placed, routed: Tensor | None, probs: Tensor | None) -> Advance:
        return ops.advance_layout(
            placed.layout, self._placed_kernels, self._min_visual_tokens, routed, probs, placed.forced
        )

    def _pool(
        self,
        x: Tensor,
        placed: DeviceLayout,
        advance: Advance,
        probs: Tensor | None,
        out_offsets: Tensor,
        *,
        lengths: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return ops.pool(
            x,
            placed.cu_seqlens,
            placed.cu_images,
            placed.image_starts,
            placed.grids,
            advance.experts,
            self._placed_kernels,
            out_offsets,
            scales=None if probs is None else advance.scales,
            function=self._function,
            conv_weights=self._conv_weights,
            lengths=lengths,
            out=out,
        )

    def _place(self, x: Tensor, layout: Layout, offsets: IntArray, forced: IntArray) -> Placed:
        """The layout with sequences at `offsets` `[num_seqs + 1]`, and the forced experts, on the device."""
        has_image = layout.image_start >= 0
        uploaded = self._device.upload(
            offsets,
            layout.first_rows,
            np.concatenate(([0], has_image.cumsum())).astype(np.int32),
            layout.image_start[has_image],
            layout.grids[has_image],
            layout.router_rows_from(offsets),
            layout.cu_router_rows,
            forced,
        )
        cu_seqlens, first_rows, cu_images, image_starts, grids, router_rows, cu_router_rows, placed_forced = uploaded
        unread = cu_seqlens.new_empty(x.shape[0])  # positions and cache rows of the stage that ends
        device_layout = DeviceLayout(
            cu_seqlens=cu_seqlens,
            first_positions=first_rows,
            first_cache_rows=first_rows,
            cu_images=cu_images,
            image_starts=image_starts,
            grids=grids,
            router_rows=router_rows,
            cu_router_rows=cu_router_rows,
            positions=unread,
            cache_rows=unread,
        )
        return Placed(device_layout, placed_forced)

    def _route(
        self, x: Tensor, placed: DeviceLayout, biases: npt.NDArray[np.float64] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Experts `[num_seqs]` int32 and probabilities `[num_seqs, num_experts]` float32; None without a router."""
        if self._router is None:
            return None, None
        placed_biases, levels = None, None
        if biases is not None and biases.any():
            placed_biases, levels = self._device.upload(biases.astype(np.float32))[0], self._levels
        probs, experts = ops.route(
            x,
            placed.router_rows,
            placed.cu_router_rows,
            self._router.predictor,
            norm_weight=self._router.norm_weight,
            norm_bias=self._router.norm_bias,
            hidden_weight=self._router.hidden_weight,
            eps=ROUTER_NORM_EPS,
            biases=placed_biases,
            levels=levels,
        )
        return experts, probs


def untouched(layout: Layout) -> BoundaryTrace:
    """What is done where every sample is skipped."""
    return BoundaryTrace(np.full_like(layout.lengths, SKIPPED), None, np.zeros(layout.num_seqs, dtype=np.bool_))


def join_traces(parts: Sequence[BoundaryTrace], order: npt.NDArray[np.intp]) -> BoundaryTrace:
    """What a boundary did with the parts of a batch, as of the whole.

    Args:
        parts: at least one.
        order: `[num_seqs]` where each sequence of the batch is among those of all parts.
    """
    probs = None
    known = [part.probs for part in parts if part.probs is not None]
    if known:
        none = np.zeros((1, known[0].shape[1]), dtype=np.float32)
        rows = [none.repeat(len(part.experts), axis=0) if part.probs is None else part.probs for part in parts]
        probs = np.concatenate(rows)[order]
    experts = np.concatenate([part.experts for part in parts])[order]
    return BoundaryTrace(experts, probs, np.concatenate([part.misfits for part in parts])[order])


def compression_levels(boundary: BoundaryConfig) -> IntArray:
    """`[num_experts]`: 0 for the smallest kernel area, 1 for the next larger one, and so on."""
    areas = np.prod(boundary.kernels, axis=1)
    levels: IntArray = np.searchsorted(np.unique(areas), areas).astype(np.int32)
    return levels
