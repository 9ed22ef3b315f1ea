"""Sequences with a sliding window over positions that have gaps, for the CPU's tests and those of the emulated GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from tests.ops.attention_reference import PagedCache, offsets
from tests.ops.conftest import random_rows

SEQUENCES = [
    [(1, 1)],
    [(40, 40), (40, 0), (17, 17)],
    [(40, 1), (40, 12), (17, 5)],
    [(97, 97), (513, 513)],
    [(257, 97), (1030, 40)],
]
"""Keys and new rows of each sequence, near multiples of tiles of 96 rows, 256 packed keys and blocks of 512 keys."""
WINDOWS = [(1, 0), (16, 60), (257, 0), (257, 60), (1030, 60), (1031, 0)]
"""Windows, and positions before a row that no row has."""


def random_positions(generator: torch.Generator, keys: int, gaps: int) -> Tensor:
    """`[keys]` rising positions; about one row in ten has up to `gaps` positions before it that no row has."""
    shape = (keys,)
    steps = torch.randint(0, gaps + 1, shape, generator=generator, device=generator.device)
    has_gap = torch.rand(shape, generator=generator, device=generator.device) < 0.1
    return (1 + steps * has_gap).cumsum(0)


def seen_keys(positions: Tensor, rows: int, window: int) -> Tensor:
    """`[rows, keys]` what the last rows see: the rule of transformers' `sliding_window_causal_mask_function`."""
    q_idx, kv_idx = positions[len(positions) - rows :, None], positions[None]
    return (kv_idx > q_idx - window) & (kv_idx <= q_idx)


@dataclass(frozen=True)
class WindowCase:
    """Random queries, keys and values; each query sees a window of positions."""

    sequences: list[tuple[int, int]]
    """Keys of each sequence, and how many of the last have a query."""
    q: Tensor
    k: Tensor
    v: Tensor
    seen: list[Tensor]
    """Per sequence `[rows, keys]`."""
    scale: float

    @classmethod
    def of(
        cls,
        generator: torch.Generator,
        sequences: list[tuple[int, int]],
        heads: tuple[int, int, int],
        dtype: torch.dtype,
        window: int,
        gaps: int = 0,
    ) -> WindowCase:
        num_heads, num_kv_heads, head_dim = heads
        keys, rows = sum(keys for keys, _ in sequences), sum(rows for _, rows in sequences)
        q = random_rows(generator, (rows, num_heads, head_dim), dtype, 2.0)
        k, v = (random_rows(generator, (keys, num_kv_heads, head_dim), dtype) for _ in range(2))
        seen = [seen_keys(random_positions(generator, keys, gaps), rows, window) for keys, rows in sequences]
        return cls(sequences, q, k, v, seen, head_dim**-0.5)

    @property
    def keys(self) -> list[int]:
        return [keys for keys, _ in self.sequences]

    @property
    def cu_seqlens(self) -> Tensor:
        return offsets([rows for _, rows in self.sequences])

    @property
    def first_keys(self) -> Tensor:
        """`[num_rows]` int32: keys of a window are consecutive."""
        firsts = [seen.int().argmax(1) for seen in self.seen if len(seen)]
        return torch.cat([*firsts, self.cu_seqlens[:0].long()]).int()

    def cache(self, block_size: int = 16) -> PagedCache:
        return PagedCache.of(self.k, self.v, self.keys, block_size)

    def reference(self, dtype: torch.dtype) -> Tensor:
        """torch's own attention with a mask, one sequence at a time, in `dtype`."""
        group = self.q.shape[1] // self.k.shape[1]
        queries = self.q.to(dtype).split([rows for _, rows in self.sequences])
        keys, values = (x.to(dtype).repeat_interleave(group, 1).split(self.keys) for x in (self.k, self.v))
        outputs = [self.q.new_empty(0, self.q.shape[1] * self.q.shape[2], dtype=dtype)]
        for q, k, v, seen in zip(queries, keys, values, self.seen, strict=True):
            heads = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
            out = functional.scaled_dot_product_attention(*heads, attn_mask=seen, scale=self.scale)
            outputs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs)
