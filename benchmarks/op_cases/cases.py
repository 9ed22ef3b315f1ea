"""The cases of benchmarks/ops.py: every kernel on the shapes of a model, with the same work in torch.

Inputs are made on torch's default device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measuring.clock import Run
from dpn_rt import ops
from dpn_rt.device.host import HostDevice

BLOCK, EPS, VISION_HEAD_DIM = 16, 1e-5, 64
GRID, KERNELS = 24, [(1, 1), (1, 2), (2, 2)]


@dataclass(frozen=True)
class KernelShapes:
    """Sizes that a model and its batches give the kernels."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    num_seqs: int
    """Sequences of one boundary."""
    decodes: tuple[tuple[int, int], ...]
    """(number of sequences, rows of each in the cache) per measurement."""
    prefills: tuple[tuple[int, ...], ...] = ((640,),)
    """Rows of each sequence, per measurement."""
    images: tuple[int, ...] = (1,)
    """Numbers of images that go through the vision encoder together."""
    rows: int = 640
    vision_rows: int = 577
    vision_hidden: int = 1024
    vision_ffn: int = 4096
    vision_heads: int = 16
    vocab_size: int = 32064


LLAVA_1B = KernelShapes(2048, 5632, 32, 4, 64, 8, ((8, 640), (1, 16384)))
LLAVA_7B = KernelShapes(
    4096, 11008, 32, 32, 128, 32, ((1, 640), (32, 640), (64, 592)),
    prefills=((636,), (636,) * 8, (636,) * 32, (69,) * 32, (636, 204, 96, 69) * 8), images=(1, 4),
)  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """Heads of an attention layer."""

    queries: int
    keys: int
    dim: int


@dataclass(frozen=True)
class Case:
    """`make()` returns (our call, torch's call) on new inputs; the counts are the least that one call has to do."""

    name: str
    shape: str
    make: Callable[[], tuple[Run, Run]]
    bytes_read: int
    bytes_written: int = 0
    flops: int = 0


def int32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def kv_cache(num_blocks: int, s: KernelShapes, dtype: torch.dtype) -> Tensor:
    """Random keys and values where the runtime would keep them."""
    values = torch.randn(num_blocks, 1, 2, s.kv_heads, BLOCK, s.head_dim).to(dtype)
    return values if values.is_cuda else HostDevice().pool(values.shape, dtype).copy_(values)


def norm_cases(s: KernelShapes, dtype: torch.dtype) -> list[Case]:
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
        make("rms_norm", s.rows, s.hidden),
        make("add_rms_norm", s.rows, s.hidden),
        make("layer_norm", s.vision_rows, s.vision_hidden),
        make("add_layer_norm", s.vision_rows, s.vision_hidden),
    ]


def activation_cases(s: KernelShapes, dtype: torch.dtype) -> list[Case]:
    def silu_mul() -> tuple[Run, Run]:
        gate_up = torch.randn(s.rows, 2 * s.ffn).to(dtype)
        gate, up = gate_up.chunk(2, dim=1)
        return lambda: ops.silu_mul(gate_up), lambda: F.silu(gate) * up

    def quick_gelu() -> tuple[Run, Run]:
        x = torch.randn(s.vision_rows, s.vision_ffn).to(dtype)
        return lambda: ops.activation(x, "quick_gelu"), lambda: x * torch.sigmoid(1.702 * x)

    def gelu() -> tuple[Run, Run]:
        x = torch.randn(s.vision_rows, s.vision_ffn).to(dtype)
        return lambda: ops.activation(x, "gelu"), lambda: F.gelu(x)

    wide, vision = s.rows * s.ffn * dtype.itemsize, s.vision_rows * s.vision_ffn * dtype.itemsize
    return [
        Case("silu_mul", f"[{s.rows}, 2 x {s.ffn}]", silu_mul, 2 * wide, wide),
        Case("quick_gelu", f"[{s.vision_rows}, {s.vision_ffn}]", quick_gelu, vision, vision),
        Case("gelu", f"[{s.vision_rows}, {s.vision_ffn}]", gelu, vision, vision),
    ]


def linear_cases(s: KernelShapes, dtype: torch.dtype) -> list[Case]:
    def make(rows: int, in_features: int, out_features: int) -> Case:
        def inputs() -> tuple[Run, Run]:
            x, weight = torch.randn(rows, in_features).to(dtype), torch.randn(out_features, in_features).to(dtype)
            return lambda: ops.linear(x, weight), lambda: F.linear(x, weight)

        count = in_features * out_features
        shape = f"{rows} x {in_features} -> {out_features}"
        return Case("linear", shape, inputs, count * dtype.itemsize, flops=2 * rows * count)

    return [make(r, s.hidden, 2 * s.ffn) for r in (1, 2, 4, 8, 16, 32)] + [make(r, s.ffn, s.hidden) for r in (1, 8)]


def rope_case(s: KernelShapes, dtype: torch.dtype) -> Case:
    turning = s.heads + s.kv_heads

    def inputs() -> tuple[Run, Run]:
        qkv = torch.randn(s.rows, (s.heads + 2 * s.kv_heads) * s.head_dim).to(dtype)
        angles = torch.randn(s.rows, s.head_dim // 2)
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
        blocks = s.rows // BLOCK
        cache = torch.zeros(blocks, 1, 2, s.kv_heads, BLOCK, s.head_dim, dtype=dtype)
        table, cu_seqlens = torch.randperm(blocks).to(torch.int32)[None], int32([0, s.rows])
        positions = torch.arange(s.rows, dtype=torch.int32)
        cos, sin = (part.repeat(1, 2)[:, None].to(dtype) for part in (angles.cos(), angles.sin()))
        k_cache, v_cache = torch.zeros(2, s.rows, s.kv_heads, s.head_dim, dtype=dtype)

        def in_torch() -> None:
            heads = qkv.view(s.rows, -1, s.head_dim)
            x = heads[:, :turning]
            first, second = x.chunk(2, dim=-1)
            rotated = x * cos + torch.cat([-second, first], dim=-1) * sin
            k_cache.copy_(rotated[:, s.heads :])
            v_cache.copy_(heads[:, turning:])

        return lambda: ops.rope_store(
            qkv, positions, positions, cos_sin, cache, 0, table, cu_seqlens, s.heads, s.kv_heads
        ), in_torch  # fmt: skip

    row = s.head_dim * dtype.itemsize
    read = s.rows * (row * (s.heads + 2 * s.kv_heads) + s.head_dim * 4)
    return Case(
        "rope_store",
        f"[{s.rows}, {s.heads} + 2 x {s.kv_heads} heads]",
        inputs,
        read,
        s.rows * row * (s.heads + 3 * s.kv_heads),
    )


def torch_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """torch's attention of `[num_seqs, num_heads, num_tokens, head_dim]`; on a GPU its flash kernels and no others."""
    where = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if q.is_cuda else nullcontext()
    with where:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def prefill_case(name: str, lengths: tuple[int, ...], heads: Heads, causal: bool, dtype: torch.dtype) -> Case:
    """Packed sequences. torch gets sequences of equal length as one batch, others one by one."""
    rows, is_even = sum(lengths), len(set(lengths)) == 1

    def inputs() -> tuple[Run, Run]:
        qkv = torch.randn(rows, heads.queries + 2 * heads.keys, heads.dim).to(dtype)
        parts = torch.split(qkv, [heads.queries, heads.keys, heads.keys], dim=1)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

        def by_head(part: Tensor) -> Tensor:
            return part.unflatten(0, (-1, lengths[0])) if is_even else part[None]

        batches = [parts] if is_even else list(zip(*(part.split(lengths) for part in parts), strict=True))
        padded = [[by_head(part).transpose(1, 2) for part in batch] for batch in batches]
        return (
            lambda: ops.attention(*parts, cu_seqlens, causal=causal, scale=heads.dim**-0.5),
            lambda: [torch_attention(*batch, causal=causal) for batch in padded],
        )

    flops = 4 * sum(n * n for n in lengths) * heads.queries * heads.dim // (2 if causal else 1)
    size = rows * heads.dim * dtype.itemsize
    sequences = str(lengths[0]) if is_even else f"{min(lengths)}-{max(lengths)}"
    shape = f"{len(lengths)} x {sequences}, {heads.queries}/{heads.keys} heads"
    return Case(name, shape, inputs, size * (heads.queries + 2 * heads.keys), size * heads.queries, flops)


def attention_cases(s: KernelShapes, dtype: torch.dtype) -> list[Case]:
    def decode(num_seqs: int, context: int) -> Case:
        def inputs() -> tuple[Run, Run]:
            q = torch.randn(num_seqs, s.heads, s.head_dim).to(dtype)
            blocks = context // BLOCK
            cache = kv_cache(num_seqs * blocks, s, dtype)
            table = torch.randperm(num_seqs * blocks).to(torch.int32).view(num_seqs, blocks)
            lengths, scale = torch.full((num_seqs,), context, dtype=torch.int32), s.head_dim**-0.5
            # torch gets a contiguous cache per sequence, unlike our paged cache.
            k, v = torch.randn(2, num_seqs, s.kv_heads, context, s.head_dim).to(dtype)
            return (
                lambda: ops.attention_decode(q, cache, 0, table, lengths, scale=scale),
                lambda: torch_attention(q[:, :, None], k, v, causal=False),
            )

        read = 2 * num_seqs * context * s.kv_heads * s.head_dim * dtype.itemsize
        flops = 4 * num_seqs * context * s.heads * s.head_dim
        return Case("attention_decode", f"{num_seqs} x {context}", inputs, read, flops=flops)

    decoder = Heads(s.heads, s.kv_heads, s.head_dim)
    tower = Heads(s.vision_heads, s.vision_heads, VISION_HEAD_DIM)
    return [
        *(prefill_case("attention causal", lengths, decoder, True, dtype) for lengths in s.prefills),
        *(prefill_case("attention full", (s.vision_rows,) * images, tower, False, dtype) for images in s.images),
        *(decode(num_seqs, context) for num_seqs, context in s.decodes),
    ]


def route_case(s: KernelShapes, dtype: torch.dtype) -> Case:
    num_seqs, size = s.num_seqs, s.hidden // 4

    def inputs() -> tuple[Run, Run]:
        x, rows = torch.randn(num_seqs * s.rows, s.hidden).to(dtype), torch.arange(num_seqs) * s.rows + s.rows - 3
        weight, bias = torch.randn(2, s.hidden)
        hidden, predictor = torch.randn(size, s.hidden) / s.hidden**0.5, torch.randn(3, size)
        router_rows, offsets = rows.to(torch.int32), torch.arange(num_seqs + 1, dtype=torch.int32)

        def in_torch() -> tuple[Tensor, Tensor]:
            features = F.layer_norm(x[rows].float(), (s.hidden,), weight, bias, EPS)
            logits = F.linear(F.gelu(F.linear(features, hidden)), predictor)
            return (logits / 10).softmax(-1), logits.argmax(-1)

        return lambda: ops.route(x, router_rows, offsets, predictor, weight, bias, hidden), in_torch

    return Case("route", f"{num_seqs} sequences", inputs, size * s.hidden * 4, flops=2 * num_seqs * size * s.hidden)


def pool_case(s: KernelShapes, dtype: torch.dtype) -> Case:
    experts = [[2, 1, 2, 0, 2, 1, 2, 2][i % 8] for i in range(s.num_seqs)]
    before, after = 35, 29
    length = before + GRID * GRID + after
    out_lengths = [before + (GRID // kh) * (GRID // kw) + after for kh, kw in (KERNELS[e] for e in experts)]

    def inputs() -> tuple[Run, Run]:
        num_seqs = len(experts)
        x, scales = torch.randn(num_seqs * length, s.hidden).to(dtype), torch.rand(num_seqs)
        cu_images = torch.arange(num_seqs + 1, dtype=torch.int32)
        cu_seqlens = cu_images * length
        out_cu_seqlens = torch.tensor([0, *out_lengths]).cumsum(0).to(torch.int32)
        starts, grids = torch.full((num_seqs,), before, dtype=torch.int32), int32([[GRID, GRID]] * num_seqs)
        chosen, kernels = int32(experts), int32(KERNELS)
        out = torch.empty(sum(out_lengths), s.hidden, dtype=dtype)

        def in_torch() -> Tensor:
            parts = []
            for rows, expert, scale in zip(torch.split(x, length), experts, scales, strict=True):
                text, visual, tail = torch.split(rows, [before, GRID * GRID, after])
                image = visual.t().reshape(1, s.hidden, GRID, GRID)
                pooled = F.max_pool2d(image, KERNELS[expert]).flatten(2)[0].t()
                parts += [text, pooled * scale.to(dtype), tail]
            return torch.cat(parts)

        return (
            lambda: ops.pool(x, cu_seqlens, cu_images, starts, grids, chosen, kernels, out_cu_seqlens, scales, out=out),
            in_torch,
        )

    row = s.hidden * dtype.itemsize
    return Case(
        "pool", f"{len(experts)} x {GRID}x{GRID} mixed", inputs, len(experts) * length * row, sum(out_lengths) * row
    )


def sample_case(s: KernelShapes, dtype: torch.dtype) -> Case:
    def inputs() -> tuple[Run, Run]:
        logits, rows = torch.randn(s.num_seqs, s.vocab_size).to(dtype), (s.num_seqs,)
        parameters = (
            torch.full(rows, 0.7), int32([0] * s.num_seqs), torch.full(rows, 0.9, dtype=torch.float64),
            torch.zeros(rows), torch.arange(s.num_seqs), torch.zeros(rows, dtype=torch.int64),
        )  # fmt: skip

        def in_torch() -> Tensor:
            probs, ids = (logits.float() / 0.7).softmax(-1).sort(descending=True)
            kept = probs.masked_fill(probs.cumsum(-1) - probs >= 0.9, 0)
            draws = torch.searchsorted(kept.cumsum(-1), torch.rand(s.num_seqs, 1) * kept.sum(-1, keepdim=True))
            return ids.gather(1, draws.clamp(max=s.vocab_size - 1))

        return lambda: ops.sample(logits, *parameters), in_torch

    shape = f"{s.num_seqs} x {s.vocab_size}, top-p"
    return Case("sample", shape, inputs, s.num_seqs * s.vocab_size * dtype.itemsize)


def all_cases(s: KernelShapes, dtype: torch.dtype, with_linear: bool) -> list[Case]:
    """All cases; with `with_linear` also the product of few rows, which only the CPU has."""
    return [
        *norm_cases(s, dtype),
        *activation_cases(s, dtype),
        *(linear_cases(s, dtype) if with_linear else []),
        rope_case(s, dtype),
        *attention_cases(s, dtype),
        route_case(s, dtype),
        pool_case(s, dtype),
        sample_case(s, dtype),
    ]
