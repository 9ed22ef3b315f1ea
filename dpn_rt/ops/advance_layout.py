"""Computes the layout of the next stage from the experts of a boundary, on the device that holds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.ops.checked import checked_op
from dpn_rt.ops.stream import stream_of


@dataclass(frozen=True)
class DeviceLayout:
    """The layout of a packed batch in one stage: int32 tensors on one device."""

    cu_seqlens: Tensor
    """`[num_seqs + 1]` first packed row of each sequence, then the number of rows."""
    first_positions: Tensor
    """`[num_seqs]` rotary position of each sequence's first row."""
    first_cache_rows: Tensor
    """`[num_seqs]` cache row of each sequence's first row, which is the number of its rows that are cached already."""
    cu_images: Tensor
    """`[num_seqs + 1]` first image of each sequence, then the number of images."""
    image_starts: Tensor
    """`[num_images]` first visual row of each image, relative to its sequence. The images of a sequence are in the
    order of their rows and do not overlap."""
    grids: Tensor
    """`[num_images, 2]` rows and columns of each image's visual tokens."""
    router_rows: Tensor
    """`[num_router_rows]` indices of the packed rows that the router reads, grouped by sequence."""
    cu_router_rows: Tensor
    """`[num_seqs + 1]` offsets into `router_rows`."""
    positions: Tensor
    """`[max_tokens]` rotary position of each packed row; 0 after the last row."""
    cache_rows: Tensor
    """`[max_tokens]` row of the sequence's KV cache that each packed row is stored in; 0 after the last row."""


@dataclass(frozen=True)
class Advance:
    """The experts that a boundary applies, and the layout after it."""

    chosen: Tensor
    """`[num_images]` int32 expert chosen; -1 for an image that is skipped because it has too few visual tokens."""
    experts: Tensor
    """`[num_images]` int32 argument of `pool`: as `chosen`, but also -1 where the kernel does not fit into the grid."""
    scales: Tensor
    """`[num_images]` float32 argument of `pool`: the expert's probability; 1 without a router."""
    layout: DeviceLayout
    """The layout of the next stage."""


@checked_op
def advance_layout(
    layout: DeviceLayout,
    kernels: Tensor,
    min_visual_tokens: int,
    routed: Tensor | None = None,
    probs: Tensor | None = None,
    forced: Tensor | None = None,
    *,
    chosen: Tensor | None = None,
    out_cu_seqlens: Tensor | None = None,
) -> Advance:
    """Each image's expert, and the layout of the next stage. Nothing is read back from a GPU.

    A sequence takes the router's expert or the forced one, for each of its images that has at least `min_visual_tokens`
    visual tokens. An image whose grid is too small for the expert's kernel stays as it is.

    Args:
        layout: of the stage before the boundary.
        kernels: `[num_experts, 2]` int32, height and width.
        min_visual_tokens: an image with fewer visual tokens is skipped.
        routed: `[num_seqs]` int32 experts from `route`; give it together with `probs`. None without a router.
        probs: `[num_seqs, num_experts]` float32 from `route`.
        forced: `[num_seqs]` int32 expert to take, -1 where the router decides; None: the router decides everywhere.
            Without a router, -1 means expert 0.
        chosen: memory for the result's field, `[num_images]` int32, contiguous; None: new memory.
        out_cu_seqlens: the same for `layout.cu_seqlens`, `[num_seqs + 1]` int32.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device, layout or content.
    """
    after = _layout_to_fill(layout, out_cu_seqlens)
    if chosen is None:
        chosen = torch.empty_like(layout.image_starts)
    experts = torch.empty_like(layout.image_starts)
    scales = torch.empty_like(layout.image_starts, dtype=torch.float32)
    _kernels.advance_layout(
        chosen,
        experts,
        scales,
        after.cu_seqlens,
        after.image_starts,
        after.grids,
        after.router_rows,
        after.positions,
        after.cache_rows,
        routed,
        probs,
        forced,
        kernels,
        min_visual_tokens,
        layout.cu_seqlens,
        layout.first_positions,
        layout.first_cache_rows,
        layout.cu_images,
        layout.image_starts,
        layout.grids,
        layout.router_rows,
        layout.cu_router_rows,
        stream_of(layout.cu_seqlens),
    )
    return Advance(chosen, experts, scales, after)


def _layout_to_fill(layout: DeviceLayout, cu_seqlens: Tensor | None) -> DeviceLayout:
    """The next stage's layout: memory for what a boundary changes, and the tensors that stay the same."""
    return DeviceLayout(
        cu_seqlens=torch.empty_like(layout.cu_seqlens) if cu_seqlens is None else cu_seqlens,
        first_positions=layout.first_positions,
        first_cache_rows=layout.first_cache_rows,
        cu_images=layout.cu_images,
        image_starts=torch.empty_like(layout.image_starts),
        grids=torch.empty_like(layout.grids),
        router_rows=torch.empty_like(layout.router_rows),
        cu_router_rows=layout.cu_router_rows,
        positions=torch.empty_like(layout.positions),
        cache_rows=torch.empty_like(layout.cache_rows),
    )
