"""What benchmarks/ops.py measures of the ops that keep visual rows by their scores, beside the same work in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.measuring.clock import Run
from benchmarks.op_cases.cases import BLOCK, GRID, Case, KernelShapes, int32, kv_cache
from dpn_rt import ops

BEFORE, VISUAL, AFTER = 35, GRID * GRID, 25
ROWS, KEPT = BEFORE + VISUAL + AFTER, VISUAL // 2


def offsets(num_parts: int, size: int) -> Tensor:
    """Of parts of the same size."""
    return torch.arange(num_parts + 1, dtype=torch.int32) * size


def scores_case(s: KernelShapes, num_seqs: int, is_paged: bool, dtype: torch.dtype) -> Case:
    """One image a sequence. torch gets its keys in one piece per sequence, which paged or fused ones are not."""

    def inputs() -> tuple[Run, Run]:
        q = torch.randn(num_seqs, s.heads, s.head_dim).to(dtype)
        segments = (torch.arange(num_seqs, dtype=torch.int32), int32([BEFORE] * num_seqs), offsets(num_seqs, VISUAL))
        out, scale = torch.empty(num_seqs * VISUAL), s.head_dim**-0.5
        dense = torch.randn(num_seqs, s.kv_heads, ROWS, s.head_dim).to(dtype)
        grouped = q.view(num_seqs, s.kv_heads, -1, s.head_dim)

        def in_torch() -> Tensor:
            weights = ((grouped @ dense.transpose(2, 3)).float() * scale).softmax(-1)
            return weights.mean((1, 2))[:, BEFORE : BEFORE + VISUAL]

        if is_paged:
            blocks = -(-ROWS // BLOCK)
            cache = kv_cache(num_seqs * blocks, s, dtype)
            table = torch.randperm(num_seqs * blocks).to(torch.int32).view(num_seqs, blocks)
            paged = (q, cache, 0, table, int32([ROWS] * num_seqs), *segments)
            return lambda: ops.last_row_scores_paged(*paged, scale=scale, out=out), in_torch
        qkv = torch.randn(num_seqs * ROWS, s.heads + 2 * s.kv_heads, s.head_dim).to(dtype)
        packed = (q, qkv[:, s.heads : s.heads + s.kv_heads], offsets(num_seqs, ROWS), *segments)
        return lambda: ops.last_row_scores(*packed, scale=scale, out=out), in_torch

    read = num_seqs * ROWS * s.kv_heads * s.head_dim * dtype.itemsize
    flops = 2 * num_seqs * ROWS * s.heads * s.head_dim
    where = "paged" if is_paged else "packed"
    return Case("last_row_scores", f"{where} {num_seqs} x {ROWS}", inputs, read, num_seqs * VISUAL * 4, flops)


def top_k_case(s: KernelShapes) -> Case:
    def inputs() -> tuple[Run, Run]:
        scores, out = torch.rand(s.num_seqs * VISUAL) / VISUAL, torch.empty(s.num_seqs * KEPT, dtype=torch.int32)
        segments = (offsets(s.num_seqs, VISUAL), offsets(s.num_seqs, KEPT))
        rows = scores.view(s.num_seqs, VISUAL)
        return (
            lambda: ops.segmented_top_k(scores, *segments, out=out),
            lambda: rows.topk(KEPT, sorted=False).indices.sort(-1).values,
        )

    shape = f"{s.num_seqs} x {KEPT} of {VISUAL}"
    return Case("segmented_top_k", shape, inputs, s.num_seqs * VISUAL * 4, s.num_seqs * KEPT * 4)


def kept_rows_case(s: KernelShapes) -> Case:
    length = ROWS - VISUAL + KEPT

    def inputs() -> tuple[Run, Run]:
        n = s.num_seqs
        kept = torch.rand(n, VISUAL).argsort(-1)[:, :KEPT].sort(-1).values
        out = torch.empty(n * length, dtype=torch.int64)
        layout = (offsets(n, ROWS), offsets(n, 1), int32([BEFORE] * n), int32([VISUAL] * n))
        arguments = (*layout, kept.flatten().to(torch.int32), offsets(n, KEPT), offsets(n, length))
        before, after = torch.arange(BEFORE).expand(n, -1), torch.arange(BEFORE + VISUAL, ROWS).expand(n, -1)
        firsts = torch.arange(n)[:, None] * ROWS
        return (
            lambda: ops.kept_rows(*arguments, out=out),
            lambda: (torch.cat([before, kept + BEFORE, after], 1) + firsts).flatten(),
        )

    shape = f"{s.num_seqs} x {length} of {ROWS}"
    return Case("kept_rows", shape, inputs, s.num_seqs * KEPT * 4, s.num_seqs * length * 8)


def reduction_cases(s: KernelShapes, dtype: torch.dtype) -> list[Case]:
    """Images of 24 x 24 rows, of which half are kept."""
    batches = [(num_seqs, is_paged) for num_seqs in (1, s.num_seqs) for is_paged in (True, False)]
    return [*(scores_case(s, *batch, dtype) for batch in batches), top_k_case(s), kept_rows_case(s)]
