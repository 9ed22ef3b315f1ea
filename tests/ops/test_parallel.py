"""Inputs that several threads share give the same result as their parts, each computed by one thread."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dpn_rt import ops

DEVICES = ["cpu"]
ROWS, SIZE = 1037, 320
"""So many elements that every kernel and dtype has more than 512 KiB, above which work is cut for threads."""
EPS = 1e-5

RowKernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Takes x `[rows, SIZE]`, a residual like it and a weight `[SIZE]`, and modifies none of them."""


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    total = residual.clone()
    return torch.cat((ops.add_rms_norm(x, total, weight, EPS), total), dim=1)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    total = residual.clone()
    return torch.cat((ops.add_layer_norm(x, total, weight, weight, EPS), total), dim=1)


ROW_KERNELS: dict[str, RowKernel] = {
    "rms_norm": lambda x, _, weight: ops.rms_norm(x, weight, EPS),
    "add_rms_norm": add_rms_norm,
    "layer_norm": lambda x, _, weight: ops.layer_norm(x, weight, weight, EPS),
    "add_layer_norm": add_layer_norm,
    "silu_mul": lambda x, residual, _: ops.silu_mul(torch.cat((x, residual), dim=1)),
    "gelu": lambda x, *_: ops.activation(x, "gelu"),
    "quick_gelu": lambda x, *_: ops.activation(x, "quick_gelu"),
}


@pytest.mark.parametrize("name", ROW_KERNELS)
def test_rows(dtype: torch.dtype, name: str) -> None:
    kernel = ROW_KERNELS[name]
    x, residual = torch.randn(2, ROWS, SIZE).to(dtype)
    weight = torch.randn(SIZE).to(dtype)
    parts = [kernel(*rows, weight) for rows in zip(x.split(100), residual.split(100), strict=True)]
    assert torch.equal(kernel(x, residual, weight), torch.cat(parts))


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 32])
def test_linear(dtype: torch.dtype, tokens: int) -> None:
    x, weight = torch.randn(tokens, SIZE).to(dtype), torch.randn(ROWS, SIZE).to(dtype)
    parts = [ops.linear(x, some.contiguous()) for some in weight.split(40)]
    assert torch.equal(ops.linear(x, weight), torch.cat(parts, dim=1))


def test_rope_store(dtype: torch.dtype) -> None:
    lengths, heads, kv_heads, head_dim, block_size = [700, 1, 0, 336], 4, 2, 48, 16
    blocks = 44
    qkv = torch.randn(sum(lengths), (heads + 2 * kv_heads) * head_dim).to(dtype)
    angles = torch.randn(700, head_dim // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    table = torch.randperm(len(lengths) * blocks).to(torch.int32).view(-1, blocks)
    cache = torch.zeros(len(lengths) * blocks, 1, 2, kv_heads, block_size, head_dim, dtype=dtype)

    def run(rows: Tensor, positions: Tensor, cache: Tensor, of: Tensor, cu_seqlens: list[int]) -> None:
        offsets = torch.tensor(cu_seqlens, dtype=torch.int32)
        rows_of = positions.to(torch.int32)
        ops.rope_store(rows, rows_of, rows_of, cos_sin, cache, 0, of, offsets, heads, kv_heads)

    parts, cache_of_parts = qkv.clone(), cache.clone()
    for sequence, rows in enumerate(parts.split(lengths)):
        for start in range(0, len(rows), 100):
            part = rows[start : start + 100]
            run(
                part,
                torch.arange(start, start + len(part)),
                cache_of_parts,
                table[sequence : sequence + 1],
                [0, len(part)],
            )
    positions = torch.cat([torch.arange(length) for length in lengths])
    run(qkv, positions, cache, table, [0, 700, 701, 701, 1037])
    assert torch.equal(qkv, parts) and torch.equal(cache, cache_of_parts)


def test_route(dtype: torch.dtype) -> None:
    x, predictor = torch.randn(96, 1500).to(dtype), torch.randn(5, 1500)
    rows, offsets = torch.arange(96, dtype=torch.int32), torch.arange(97, dtype=torch.int32)
    whole = ops.route(x, rows, offsets, predictor)
    alone = [ops.route(x, rows[i : i + 1], offsets[:2], predictor) for i in range(96)]
    for result, parts in zip(whole, zip(*alone, strict=True), strict=True):
        assert torch.equal(result, torch.cat(parts))
