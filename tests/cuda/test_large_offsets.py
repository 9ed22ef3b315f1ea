"""KV pools of more than 2^31 elements: a kernel that computes an offset in 32 bits reads or writes somewhere else.

Such a pool takes more than 4 GB of addresses, but only the few pages of its last blocks are ever touched.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import Guards, int32, offsets
from tests.cuda.emulated import Kernels
from tests.ops.attention_reference import PagedCache
from tests.ops.conftest import random_rows

CONTEXTS = [1, 70, 16]
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 4, 2, 64, 16


def large(blocks: Tensor) -> Tensor:
    """A pool whose last blocks are `blocks`, behind 2^31 elements that no test touches."""
    unused = -(-(2**31) // blocks[0].numel())
    pool = torch.empty(unused + len(blocks), *blocks.shape[1:], dtype=blocks.dtype)
    pool[unused:] = blocks
    return pool


def moved(table: Tensor, pool: Tensor, blocks: Tensor) -> Tensor:
    """Numbers of blocks in `blocks` -> in `pool`; entries without a block stay -1."""
    return torch.where(table < 0, table, table + (len(pool) - len(blocks)))


def both(cache: PagedCache) -> list[PagedCache]:
    """The cache as it is, and the same at the end of a large pool."""
    pool = large(cache.kv_cache)
    return [cache, replace(cache, kv_cache=pool, block_table=moved(cache.block_table, pool, cache.kv_cache))]


@pytest.mark.parametrize("op", ["attention_decode", "attention_extend"])
def test_attention_over_the_end_of_a_large_pool(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, op: str
) -> None:
    lengths = [1] * len(CONTEXTS) if op == "attention_decode" else [1, 33, 5]
    q = guards.put(random_rows(generator, (sum(lengths), HEADS, HEAD_DIM), dtype))
    k, v = (random_rows(generator, (sum(CONTEXTS), KV_HEADS, HEAD_DIM), dtype) for _ in range(2))
    outs = []
    for cache in both(PagedCache.of(k, v, CONTEXTS, BLOCK_SIZE)):
        out = guards.poisoned(sum(lengths), HEADS * HEAD_DIM, dtype=dtype)
        given = (cache.kv_cache, cache.layer_in_block, guards.put(cache.block_table))
        if op == "attention_decode":
            size = kernels.number("attention_decode_workspace_size", q, cache.kv_cache, cache.block_table)
            workspace = guards.poisoned(size, dtype=torch.float32) if size else None
            kernels.attention_decode(out, q, *given, guards.put(cache.context_lens), None, 0.125, workspace)
        else:
            kernels.attention_extend(
                out, q, *given, guards.put(offsets(lengths)), guards.put(cache.context_lens), None, 0.125
            )
        outs.append(out)
    assert outs[0].isfinite().all()
    assert torch.equal(*outs)


def test_rows_are_stored_at_the_end_of_a_large_pool(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype
) -> None:
    num_tokens, num_blocks = 21, 4
    qkv = random_rows(generator, (num_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM), dtype)
    rows = guards.put(int32(list(range(num_tokens))))
    angles = torch.randn(num_tokens, HEAD_DIM // 2, generator=generator)
    cos_sin = guards.put(torch.cat([angles.cos(), angles.sin()], 1))
    blocks = torch.full((num_blocks, 3, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM), float("nan"), dtype=dtype)
    pool, table = large(blocks), int32([[3, 1]])
    for target, numbers in ((blocks, table), (pool, moved(table, pool, blocks))):
        kernels.rope_store(
            guards.put(qkv), rows, rows, cos_sin, target, 1, guards.put(numbers), guards.put(offsets([num_tokens])),
            HEADS, KV_HEADS, None, None, 1e-5,
        )  # fmt: skip
    stored = pool[len(pool) - num_blocks :]
    assert torch.equal(stored.isnan(), blocks.isnan()) and not blocks.isnan().all()
    assert torch.equal(stored.nan_to_num(7), blocks.nan_to_num(7))
