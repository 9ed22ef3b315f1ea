"""What benchmarks/ops.py measures: every kernel on the shapes of llava-1b, beside the same work in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dpn_rt import ops

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 2048, 5632, 32, 4, 64
VISION_ROWS, VISION_HIDDEN, VISION_FFN, VISION_HEADS = 577, 1024, 4096, 16
ROWS, BLOCK, EPS = 640, 16, 1e-5
GRID, KERNELS = 24, [(1, 1), (1, 2), (2, 2)]

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """`make()` returns new inputs' (ours, torch) calls; the counts are what one call cannot do without."""

    name: str
    shape: str
    make: Callable[[], tuple[Run, Run]]
    bytes_read: int
    bytes_written: int = 0
    flops: int = 0


def int32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def norm_cases(dtype: torch.dtype) -> list[Case]:
    def make(name: str, rows: int, size: int) -> Case:
        def inputs() -> tuple[Run, Run]:
            x, residual = torch.randn(2, rows, size).to(dtype)
            weight, bias = torch.randn(2, size).to(dtype)
            pairs: dict[str, tuple[Run, Run]] = {
                "rms_norm": (lambda: ops.rms_norm(x, weight, EPS), lambda: F.rms_norm(x, (size,), weight, EPS)),
                "add_rms_norm": (
                    lambda: ops.add_rms_norm(x, residual, weight, EPS),
                    lambda: F.rms_norm(residual.add_(x), (size,), weight, EPS),
                ),
                "layer_norm": (
                    lambda: ops.layer_norm(x, weight, bias, EPS),
                    lambda: F.layer_norm(x, (size,), weight, bias, EPS),
                ),
                "add_layer_norm": (
                    lambda: ops.add_layer_norm(x, residual, weight, bias, EPS),
                    lambda: F.layer_norm(residual.add_(x), (size,), weight, bias, EPS),
                ),
            }
            return pairs[name]

        size_bytes = rows * size * dtype.itemsize
        passes = 2 if name.startswith("add") else 1
        return Case(name, f"[{rows}, {size}]", inputs, passes * size_bytes, passes * size_bytes)

    return [
        make("rms_norm", ROWS, HIDDEN),
        make("add_rms_norm", ROWS, HIDDEN),
        make("layer_norm", VISION_ROWS, VISION_HIDDEN),
        make("add_layer_norm", VISION_ROWS, VISION_HIDDEN),
    ]


def activation_cases(dtype: torch.dtype) -> list[Case]:
    def silu_mul() -> tuple[Run, Run]:
        gate_up = torch.randn(ROWS, 2 * FFN).to(dtype)
        gate, up = gate_up.chunk(2, dim=1)
        return lambda: ops.silu_mul(gate_up), lambda: F.silu(gate) * up

    def quick_gelu() -> tuple[Run, Run]:
        x = torch.randn(VISION_ROWS, VISION_FFN).to(dtype)
        return lambda: ops.activation(x, "quick_gelu"), lambda: x * torch.sigmoid(1.702 * x)

    def gelu() -> tuple[Run, Run]:
        x = torch.randn(VISION_ROWS, VISION_FFN).to(dtype)
        return lambda: ops.activation(x, "gelu"), lambda: F.gelu(x)

    wide, vision = ROWS * FFN * dtype.itemsize, VISION_ROWS * VISION_FFN * dtype.itemsize
    return [
        Case("silu_mul", f"[{ROWS}, 2 x {FFN}]", silu_mul, 2 * wide, wide),
        Case("quick_gelu", f"[{VISION_ROWS}, {VISION_FFN}]", quick_gelu, vision, vision),
        Case("gelu", f"[{VISION_ROWS}, {VISION_FFN}]", gelu, vision, vision),
    ]


def linear_cases(dtype: torch.dtype) -> list[Case]:
    def make(rows: int, in_features: int, out_features: int) -> Case:
        def inputs() -> tuple[Run, Run]:
            x, weight = torch.randn(rows, in_features).to(dtype), torch.randn(out_features, in_features).to(dtype)
            return lambda: ops.linear(x, weight), lambda: F.linear(x, weight)

        count = in_features * out_features
        shape = f"{rows} x {in_features} -> {out_features}"
        return Case("linear", shape, inputs, count * dtype.itemsize, flops=2 * rows * count)

    return [make(r, HIDDEN, 2 * FFN) for r in (1, 2, 4, 8, 16, 32)] + [make(r, FFN, HIDDEN) for r in (1, 8)]


def rope_case(dtype: torch.dtype) -> Case:
    turning = HEADS + KV_HEADS

    def inputs() -> tuple[Run, Run]:
        qkv = torch.randn(ROWS, (HEADS + 2 * KV_HEADS) * HEAD_DIM).to(dtype)
        angles = torch.randn(ROWS, HEAD_DIM // 2)
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
        cells = ROWS // BLOCK
        cache = torch.zeros(cells, 1, 2, KV_HEADS, BLOCK, HEAD_DIM, dtype=dtype)
        table, cu_seqlens = torch.randperm(cells).to(torch.int32)[None], int32([0, ROWS])
        positions = torch.arange(ROWS, dtype=torch.int32)
        cos, sin = (part.repeat(1, 2)[:, None].to(dtype) for part in (angles.cos(), angles.sin()))
        k_cache, v_cache = torch.zeros(2, ROWS, KV_HEADS, HEAD_DIM, dtype=dtype)

        def in_torch() -> None:
            heads = qkv.view(ROWS, -1, HEAD_DIM)
            x = heads[:, :turning]
            first, second = x.chunk(2, dim=-1)
            rotated = x * cos + torch.cat([-second, first], dim=-1) * sin
            k_cache.copy_(rotated[:, HEADS:])
            v_cache.copy_(heads[:, turning:])

        return lambda: ops.rope_store(
            qkv, positions, cos_sin, cache, 0, table, cu_seqlens, HEADS, KV_HEADS
        ), in_torch  # fmt: skip

    row = HEAD_DIM * dtype.itemsize
    read = ROWS * (row * (HEADS + 2 * KV_HEADS) + HEAD_DIM * 4)
    return Case(
        "rope_store", f"[{ROWS}, {HEADS} + 2 x {KV_HEADS} heads]", inputs, read, ROWS * row * (HEADS + 3 * KV_HEADS)
    )


def attention_cases(dtype: torch.dtype) -> list[Case]:
    def prefill(name: str, rows: int, heads: int, kv_heads: int, causal: bool) -> Case:
        def inputs() -> tuple[Run, Run]:
            qkv = torch.randn(rows, heads + 2 * kv_heads, HEAD_DIM).to(dtype)
            q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
            cu_seqlens, scale = int32([0, rows]), HEAD_DIM**-0.5
            heads_q, heads_k, heads_v = (part.transpose(0, 1)[None] for part in (q, k, v))
            return (
                lambda: ops.attention(q, k, v, cu_seqlens, causal=causal, scale=scale),
                lambda: F.scaled_dot_product_attention(
                    heads_q, heads_k, heads_v, is_causal=causal, enable_gqa=heads != kv_heads
                ),
            )

        flops = 4 * rows * rows * heads * HEAD_DIM // (2 if causal else 1)
        size = rows * HEAD_DIM * dtype.itemsize
        shape = f"[{rows}, {heads}/{kv_heads} heads]"
        return Case(name, shape, inputs, size * (heads + 2 * kv_heads), size * heads, flops)

    def decode(num_seqs: int, context: int) -> Case:
        def inputs() -> tuple[Run, Run]:
            q = torch.randn(num_seqs, HEADS, HEAD_DIM).to(dtype)
            blocks = context // BLOCK
            cache = torch.randn(num_seqs * blocks, 1, 2, KV_HEADS, BLOCK, HEAD_DIM).to(dtype)
            table = torch.randperm(num_seqs * blocks).to(torch.int32).view(num_seqs, blocks)
            lengths, scale = torch.full((num_seqs,), context, dtype=torch.int32), HEAD_DIM**-0.5
            # torch gets its cache in one piece per sequence, which a paged cache is not.
            k, v = torch.randn(2, num_seqs, KV_HEADS, context, HEAD_DIM).to(dtype)
            return (
                lambda: ops.attention_decode(q, cache, 0, table, lengths, scale=scale),
                lambda: F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True),
            )

        read = 2 * num_seqs * context * KV_HEADS * HEAD_DIM * dtype.itemsize
        flops = 4 * num_seqs * context * HEADS * HEAD_DIM
        return Case("attention_decode", f"{num_seqs} x {context}", inputs, read, flops=flops)

    return [
        prefill("attention causal", ROWS, HEADS, KV_HEADS, True),
        prefill("attention full", VISION_ROWS, VISION_HEADS, VISION_HEADS, False),
        decode(8, ROWS),
        decode(1, 16384),
    ]


def route_case(dtype: torch.dtype) -> Case:
    num_seqs, size = 8, HIDDEN // 4

    def inputs() -> tuple[Run, Run]:
        x, rows = torch.randn(num_seqs * ROWS, HIDDEN).to(dtype), torch.arange(num_seqs) * ROWS + ROWS - 3
        weight, bias = torch.randn(2, HIDDEN)
        hidden, predictor = torch.randn(size, HIDDEN) / HIDDEN**0.5, torch.randn(3, size)
        router_rows, offsets = rows.to(torch.int32), torch.arange(num_seqs + 1, dtype=torch.int32)

        def in_torch() -> tuple[Tensor, Tensor]:
            features = F.layer_norm(x[rows].float(), (HIDDEN,), weight, bias, EPS)
            logits = F.linear(F.gelu(F.linear(features, hidden)), predictor)
            return (logits / 10).softmax(-1), logits.argmax(-1)

        return lambda: ops.route(x, router_rows, offsets, predictor, weight, bias, hidden), in_torch

    return Case("route", f"{num_seqs} sequences", inputs, size * HIDDEN * 4, flops=2 * num_seqs * size * HIDDEN)


def pool_case(dtype: torch.dtype) -> Case:
    experts = [2, 1, 2, 0, 2, 1, 2, 2]
    before, after = 35, 29
    length = before + GRID * GRID + after
    out_lengths = [before + (GRID // kh) * (GRID // kw) + after for kh, kw in (KERNELS[e] for e in experts)]

    def inputs() -> tuple[Run, Run]:
        num_seqs = len(experts)
        x, scales = torch.randn(num_seqs * length, HIDDEN).to(dtype), torch.rand(num_seqs)
        cu_seqlens = torch.arange(num_seqs + 1, dtype=torch.int32) * length
        out_cu_seqlens = torch.tensor([0, *out_lengths]).cumsum(0).to(torch.int32)
        starts, grids = torch.full((num_seqs,), before, dtype=torch.int32), int32([[GRID, GRID]] * num_seqs)
        chosen, kernels = int32(experts), int32(KERNELS)

        def in_torch() -> Tensor:
            parts = []
            for rows, expert, scale in zip(torch.split(x, length), experts, scales, strict=True):
                text, visual, tail = torch.split(rows, [before, GRID * GRID, after])
                image = visual.t().reshape(1, HIDDEN, GRID, GRID)
                pooled = F.max_pool2d(image, KERNELS[expert]).flatten(2)[0].t()
                parts += [text, pooled * scale.to(dtype), tail]
            return torch.cat(parts)

        return (
            lambda: ops.pool(x, cu_seqlens, starts, grids, chosen, kernels, out_cu_seqlens, scales),
            in_torch,
        )

    row = HIDDEN * dtype.itemsize
    return Case(
        "pool", f"{len(experts)} x {GRID}x{GRID} mixed", inputs, len(experts) * length * row, sum(out_lengths) * row
    )


def all_cases(dtype: torch.dtype) -> list[Case]:
    return [
        *norm_cases(dtype),
        *activation_cases(dtype),
        *linear_cases(dtype),
        rope_case(dtype),
        *attention_cases(dtype),
        route_case(dtype),
        pool_case(dtype),
    ]
