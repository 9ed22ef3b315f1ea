"""DPN's reducer: route each sample, pool its visual tokens, return the rows and the layout of the next stage.

Behaviour as published (DPN, arXiv 2503.20322, section 3): an image with fewer than 16 visual tokens, or fewer than the
largest kernel covers, stays as it is. A sample whose kernel is higher or wider than its grid fails; the others of the
batch are not affected.

The routers' choice is used where it is made: rows are pooled and the next layout is made on the device. The host is
told later, by one readback per boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.device.device import Device, PackedOutputs, PackedReadback
from dpn_rt.errors import RequestError
from dpn_rt.model.layout import IntArray, Layout
from dpn_rt.model.reduction.choice import Choice
from dpn_rt.model.reduction.pooling_config import (
    ROUTER_HIDDEN,
    ROUTER_NORM,
    ROUTER_PREDICTOR,
    SKIPPED,
    BoundaryConfig,
    PoolingConfig,
    expert_module,
    router_module,
)
from dpn_rt.model.reduction.reducer import DeviceInputs, Outcome, StageOutput, forced_experts
from dpn_rt.ops import Advance, DeviceLayout

ROUTER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class PoolingTrace:
    """What a boundary did."""

    config: BoundaryConfig
    cu_images: IntArray
    """`[num_seqs + 1]` first image of each sequence, and the number of images at the end."""
    grids: IntArray
    """`[num_images, 2]` before the boundary."""
    experts: IntArray
    """`[num_images]` expert taken, -1 where skipped."""
    too_large: npt.NDArray[np.bool_]
    """`[num_images]` whether the expert's kernel is higher or wider than the grid; the image was left as it is, and
    what is computed from it afterwards means nothing."""
    probs: npt.NDArray[np.float32] | None
    """`[num_seqs, num_experts]` probabilities of the router; None where no router runs."""

    def select(self, kept: npt.NDArray[np.intp]) -> PoolingTrace:
        """Of these sequences alone."""
        ranges = [np.arange(*self.cu_images[index : index + 2]) for index in kept]
        images = np.concatenate([*ranges, np.empty(0)]).astype(np.intp)
        cu_images = np.cumsum([0, *map(len, ranges)], dtype=np.int32)
        probs = None if self.probs is None else self.probs[kept]
        experts, too_large = self.experts[images], self.too_large[images]
        return PoolingTrace(self.config, cu_images, self.grids[images], experts, too_large, probs)

    def outcome(self, index: int) -> Outcome:
        """Of one sequence."""
        images = range(*self.cu_images[index : index + 2])
        experts = [int(self.experts[image]) for image in images]
        taken = [expert for expert in experts if expert != SKIPPED]
        has_probs = self.probs is not None and bool(taken)
        return Outcome(
            experts=[None if expert == SKIPPED else expert for expert in experts],
            kernels=[None if expert == SKIPPED else self.config.kernels[expert] for expert in experts],
            probs=self.probs[index].tolist() if self.probs is not None and has_probs else None,
            choice=Choice(expert=taken[0]) if taken else Choice(),  # a skipped image is skipped again
            failure=next((self._failure(image) for image in images if self.too_large[image]), None),
        )

    def _failure(self, image: int) -> RequestError:
        expert, grid = int(self.experts[image]), tuple(map(int, self.grids[image]))
        return RequestError(
            f"the kernel {self.config.kernels[expert]} of expert {expert} behind layer {self.config.layer} does not "
            f"fit the grid {grid} of visual tokens: force another route or give a larger grid"
        )


@dataclass(frozen=True)
class Router:
    """Weights of a router, float32; `norm_weight`, `norm_bias` and `hidden_weight` are None for version 2."""

    predictor: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    hidden_weight: Tensor | None

    @classmethod
    def of_engine(cls, weights: Mapping[str, Tensor], boundary: int) -> Router:
        norm = router_module(boundary, ROUTER_NORM)
        return cls(
            predictor=weights[f"{router_module(boundary, ROUTER_PREDICTOR)}.weight"],
            norm_weight=weights.get(f"{norm}.weight"),
            norm_bias=weights.get(f"{norm}.bias"),
            hidden_weight=weights.get(f"{router_module(boundary, ROUTER_HIDDEN)}.weight"),
        )


class PooledRows:
    """`Reduced`: pooled rows on their way."""

    next_keys = None

    def __init__(
        self, rows: Tensor, advance: Advance, before: Layout, config: BoundaryConfig, readback: PackedReadback
    ) -> None:
        """
        Args:
            rows: of the next stage, with anything after the last.
            advance: to the next stage.
            before: layout of the stage that ends here.
            config: of the boundary.
            readback: the chosen experts, the next stage's offsets, and the probabilities where there is a router.
        """
        self.rows = rows
        self.device_layout: DeviceLayout = advance.layout
        self.has_cached_rows = bool(before.first_cache_rows.any())
        self._before, self._config, self._readback = before, config, readback

    @cached_property
    def _told(self) -> tuple[IntArray, IntArray, npt.NDArray[np.float32] | None]:
        chosen, cu_seqlens, *probs = self._readback.wait()
        return chosen, cu_seqlens, probs[0] if probs else None

    @property
    def num_rows(self) -> int:
        """Of the next stage."""
        return int(self._told[1][-1])

    def finish(self) -> tuple[Layout, PoolingTrace]:
        """The next stage's layout on the host, and what was done."""
        chosen, _, probs = self._told
        before = self._before
        grids, too_large = self._config.pooled(before.grids, chosen)
        trace = PoolingTrace(self._config, before.cu_images, before.grids, chosen, too_large, probs)
        return before.with_grids(grids), trace


class PoolingReducer:
    """`Reducer`: routing and pooling on the output of one decoder layer."""

    reads_queries = False

    def __init__(self, config: PoolingConfig, index: int, weights: Mapping[str, Tensor], device: Device) -> None:
        """Takes `boundaries.{index}.*` from an engine's weights, which are on `device`."""
        self._config = boundary = config.boundaries[index]
        self._device = device
        self._function = config.pooling_function
        kernels = np.asarray(boundary.kernels, dtype=np.int32)
        self._kernels, self._levels = device.upload(kernels, boundary.compression_levels)
        self._router: Router | None = None
        if config.pooling_type == "adaptive":
            self._router = Router.of_engine(weights, index)
        self._conv_weights: list[Tensor] | None = None
        if config.pooling_function == "conv":
            modules = (expert_module(index, expert) for expert in range(boundary.num_experts))
            self._conv_weights = [weights[f"{module}.weight"] for module in modules]

    def most_rows(self, layout: Layout, choices: Sequence[Choice]) -> IntArray:
        """See `Reducer`: as many as now where a router decides."""
        forced = forced_experts(choices)
        known = forced if self._router is not None else np.maximum(forced, 0)
        experts = np.repeat(known, np.diff(layout.cu_images))
        chosen = self._config.choose(layout.grids, experts)  # UNFORCED counts as SKIPPED
        if (chosen == SKIPPED).all():
            return layout.kv_lengths
        grids, _ = self._config.pooled(layout.grids, chosen)
        return layout.with_grids(grids).kv_lengths

    def reduce(self, output: StageOutput) -> PooledRows | None:
        """Routes and pools; None where every image is skipped.

        Without a router a forced expert is taken, and expert 0 where none is forced.
        """
        layout = output.layout
        if (self._config.choose(layout.grids, np.zeros(len(layout.grids), dtype=np.int32)) == SKIPPED).all():
            return None
        inputs = output.device_inputs or self._upload(output)
        told = self._outputs_for_host(layout)
        chosen, out_cu_seqlens, *router_probs = told.tensors
        routed, probs = self._route(output.rows, inputs.layout, output.router_biases, *router_probs)
        advance = ops.advance_layout(
            inputs.layout,
            self._kernels,
            self._config.min_visual_tokens,
            routed,
            probs,
            inputs.forced,
            chosen=chosen,
            out_cu_seqlens=out_cu_seqlens,
        )
        readback = told.read()
        rows = ops.pool(
            output.rows,
            inputs.layout.cu_seqlens,
            inputs.layout.cu_images,
            inputs.layout.image_starts,
            inputs.layout.grids,
            advance.experts,
            self._kernels,
            advance.layout.cu_seqlens,
            scales=None if probs is None else advance.scales,
            function=self._function,
            conv_weights=self._conv_weights,
        )
        return PooledRows(rows, advance, layout, self._config, readback)

    def _outputs_for_host(self, layout: Layout) -> PackedOutputs:
        """Memory for the chosen experts, the next stage's offsets, and the probabilities where there is a router."""
        num_images, num_seqs = len(layout.grids), len(layout.lengths)
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
            ((num_images,), torch.int32),
            ((num_seqs + 1,), torch.int32),
        ]
        if self._router is not None:
            shapes.append(((num_seqs, self._config.num_experts), torch.float32))
        return PackedOutputs(self._device, shapes)

    def _upload(self, output: StageOutput) -> DeviceInputs:
        """The layout and the forced experts, on the device."""
        layout = output.layout
        cu_seqlens, first_positions, first_cache_rows, cu_images, image_starts, grids, router_rows, cu_rows, forced = (
            self._device.upload(
                layout.cu_seqlens,
                layout.first_positions,
                layout.first_cache_rows,
                layout.cu_images,
                layout.image_starts,
                layout.grids,
                layout.router_rows_from(layout.cu_seqlens),
                layout.cu_router_rows,
                output.forced,
            )
        )
        unread = cu_seqlens.new_empty(output.rows.shape[0])  # positions and cache rows of the stage that ends
        device_layout = DeviceLayout(
            cu_seqlens=cu_seqlens,
            first_positions=first_positions,
            first_cache_rows=first_cache_rows,
            cu_images=cu_images,
            image_starts=image_starts,
            grids=grids,
            router_rows=router_rows,
            cu_router_rows=cu_rows,
            positions=unread,
            cache_rows=unread,
        )
        return DeviceInputs(device_layout, forced)

    def _route(
        self, x: Tensor, layout: DeviceLayout, biases: npt.NDArray[np.float64], out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Experts `[num_seqs]` int32 and probabilities `[num_seqs, num_experts]` float32; None without a router.

        `out` is memory for the probabilities.
        """
        if self._router is None:
            return None, None
        device_biases, levels = None, None
        if biases.any():
            device_biases, levels = self._device.upload(biases.astype(np.float32))[0], self._levels
        probs, experts = ops.route(
            x,
            layout.router_rows,
            layout.cu_router_rows,
            self._router.predictor,
            norm_weight=self._router.norm_weight,
            norm_bias=self._router.norm_bias,
            hidden_weight=self._router.hidden_weight,
            eps=ROUTER_NORM_EPS,
            biases=device_biases,
            levels=levels,
            probs=out,
        )
        return experts, probs
