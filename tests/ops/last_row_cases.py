"""Batches whose last rows are scored, for the CPU's tests and those of the emulated GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from tests.ops.attention_reference import PagedCache, offsets
from tests.ops.conftest import random_rows


def int32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class Heads:
    queries: int
    keys: int
    dim: int


@dataclass(frozen=True)
class Prompt:
    """The rows that one query sees: images, each a number of rows after some text, and text at the end."""

    images: tuple[tuple[int, int], ...]
    after: int

    @property
    def length(self) -> int:
        return sum(before + rows for before, rows in self.images) + self.after

    @property
    def starts(self) -> list[int]:
        ends = [0, *accumulate(before + rows for before, rows in self.images)]
        return [end + before for end, (before, _) in zip(ends, self.images, strict=False)]


def one_image(rows: int, before: int = 35, after: int = 25) -> Prompt:
    return Prompt(((before, rows),), after)


def text(rows: int) -> Prompt:
    return Prompt((), rows)


@dataclass(frozen=True)
class Segment:
    query: int
    start: int
    rows: int


class Batch:
    """Random queries and keys."""

    def __init__(self, prompts: list[Prompt], heads: Heads, dtype: torch.dtype, generator: torch.Generator) -> None:
        self.prompts, self.heads = prompts, heads
        self.lengths = [prompt.length for prompt in prompts]
        self.q = random_rows(generator, (len(prompts), heads.queries, heads.dim), dtype, 2.0)
        self.k = random_rows(generator, (sum(self.lengths), heads.keys, heads.dim), dtype)
        self.scale = heads.dim**-0.5
        self.first_keys: Tensor | None = None
        """`[num_queries]` int32 first key that each query sees; None: key 0."""
        self.segments = [
            Segment(query, start, rows)
            for query, prompt in enumerate(prompts)
            for start, (_, rows) in zip(prompt.starts, prompt.images, strict=True)
        ]

    @property
    def segment_arguments(self) -> dict[str, Tensor]:
        return {
            "segment_queries": int32([segment.query for segment in self.segments]),
            "segment_starts": int32([segment.start for segment in self.segments]),
            "cu_scores": offsets([segment.rows for segment in self.segments]),
        }

    @property
    def num_scores(self) -> int:
        return sum(segment.rows for segment in self.segments)

    @property
    def packed_arguments(self) -> dict[str, Tensor]:
        return {"q": self.q, "k": self.k, "cu_seqlens": offsets(self.lengths), **self.segment_arguments}

    @cached_property
    def values(self) -> Tensor:
        """Of the cache: they are never read."""
        return torch.full_like(self.k, float("nan"))

    def paged_arguments(self, block_size: int) -> dict[str, object]:
        cache = PagedCache.of(self.k, self.values, self.lengths, block_size)
        return {
            "q": self.q, "blocks": cache.kv_cache, "layer_in_block": cache.layer_in_block,
            "block_table": cache.block_table, "kv_lengths": cache.context_lens, **self.segment_arguments,
        }  # fmt: skip

    def reference(self, dtype: torch.dtype) -> Tensor:
        """Query by query in plain torch, in `dtype`."""
        means = [self._mean_weights(query, keys, dtype) for query, keys in enumerate(self.k.split(self.lengths))]
        parts = [means[s.query][s.start : s.start + s.rows] for s in self.segments]
        return torch.cat([torch.empty(0, dtype=dtype), *parts])

    def _mean_weights(self, query: int, keys: Tensor, dtype: torch.dtype) -> Tensor:
        group = self.heads.queries // self.heads.keys
        keys = keys.to(dtype).repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,khd->hk", self.q[query].to(dtype), keys) * self.scale
        if self.first_keys is not None:
            scores[:, : self.first_keys[query]] = -float("inf")
        return scores.softmax(-1).mean(0)


SIZES = [1, 15, 16, 17, 575, 576, 2880]
HEADS = [
    Heads(2, 2, 16), Heads(8, 2, 16), Heads(8, 1, 16), Heads(3, 3, 64), Heads(4, 1, 64), Heads(16, 2, 64),
    Heads(2, 2, 128), Heads(8, 2, 128), Heads(8, 1, 128),
]  # fmt: skip
OTHER_HEADS = [Heads(6, 2, 96), Heads(17, 1, 32), Heads(20, 1, 80), Heads(3, 1, 24), Heads(2, 2, 8), Heads(5, 5, 40)]
RAGGED = [
    text(3), Prompt(((0, 16), (0, 17)), 0), one_image(1, 0, 0), text(0), Prompt(((2, 0), (3, 40), (0, 0), (1, 9)), 4),
    one_image(64, 64, 0), one_image(63, 1, 1), Prompt(tuple((i % 2, i) for i in range(9)), 70), text(130),
]  # fmt: skip
