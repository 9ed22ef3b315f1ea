"""The layout of the next stage, made where the experts are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpn_rt import _kernels
from dpn_rt.ops.checked import face
from dpn_rt.ops.stream import stream_of


@dataclass(frozen=True)
class DeviceLayout:
    """Rows of a packed batch in one stage, int32 tensors of one device."""

    cu_seqlens: Tensor
    """`[num_seqs + 1]` first packed row of each sequence, and the number of rows at the end."""
    first_positions: Tensor
    """`[num_seqs]` position of each sequence's first row."""
    first_cache_rows: Tensor
    """`[num_seqs]` row of its KV cache that each sequence's first row is stored in: rows before it are cached."""
    image_start: Tensor
    """`[num_seqs]` first visual row, relative to the sequence, -1 without an image."""
    grids: Tensor
    """`[num_seqs, 2]` rows and columns of visual tokens, (0, 0) without an image."""
    router_rows: Tensor
    """`[num_router_rows]` packed rows that the router reads, grouped by sequence."""
    cu_router_rows: Tensor
    """`[num_seqs + 1]` offsets into `router_rows`."""
    positions: Tensor
    """`[max_tokens]` rotary position of each packed row, 0 after the last."""
    cache_rows: Tensor
    """`[max_tokens]` row of its sequence's KV cache that each packed row is stored in, 0 after the last."""


@dataclass(frozen=True)
class Advance:
    """What a boundary does, and the layout behind it."""

    chosen: Tensor
    """`[num_seqs]` int32 expert taken, -1 where the sample has too few visual tokens and is skipped."""
    experts: Tensor
    """`[num_seqs]` int32 for `pool`: as `chosen`, but -1 also where the kernel is higher or wider than the grid."""
    scales: Tensor
    """`[num_seqs]` float32 for `pool`: the expert's probability; 1 without a router."""
    layout: DeviceLayout


@face
def advance_layout(
    layout: DeviceLayout,
    kernels: Tensor,
    min_visual_tokens: int,
    routed: Tensor | None = None,
    probs: Tensor | None = None,
    forced: Tensor | None = None,
) -> Advance:
    """The counterpart of `pyramid.pooled_grids` and `Layout.pooled` that reads nothing back from the GPU.

    Args:
        layout: of the stage before.
        kernels: `[num_experts, 2]` int32, height and width.
        min_visual_tokens: from which on a sample is pooled.
        routed: `[num_seqs]` int32 from `route`, with `probs`; None without a router.
        probs: `[num_seqs, num_experts]` float32 from `route`.
        forced: `[num_seqs]` int32 expert to take, -1 where the router decides; None: it decides everywhere. Without a
            router, -1 means expert 0.

    Raises:
        KernelArgumentError: an argument has the wrong shape, dtype, device, layout or content.
    """
    after = DeviceLayout(
        cu_seqlens=torch.empty_like(layout.cu_seqlens),
        first_positions=layout.first_positions,
        first_cache_rows=layout.first_cache_rows,
        image_start=layout.image_start,
        grids=torch.empty_like(layout.grids),
        router_rows=torch.empty_like(layout.router_rows),
        cu_router_rows=layout.cu_router_rows,
        positions=torch.empty_like(layout.positions),
        cache_rows=torch.empty_like(layout.cache_rows),
    )
    chosen, experts = torch.empty_like(layout.first_cache_rows), torch.empty_like(layout.first_cache_rows)
    scales = torch.empty_like(layout.first_cache_rows, dtype=torch.float32)
    _kernels.advance_layout(
        chosen,
        experts,
        scales,
        after.cu_seqlens,
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
        layout.image_start,
        layout.grids,
        layout.router_rows,
        layout.cu_router_rows,
        stream_of(layout.grids),
    )
    return Advance(chosen, experts, scales, after)
