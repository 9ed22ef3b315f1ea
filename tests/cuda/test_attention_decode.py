from __future__ import annotations

import pytest
import torch

from tests.cuda.conftest import Guards, assert_near
from tests.cuda.emulated import KernelError, Kernels
from tests.cuda.test_attention import HEAD_DIMS, reference
from tests.ops.attention_reference import PagedCache
from tests.ops.conftest import random_rows
from tests.ops.window_cases import WindowCase


def run(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, contexts: list[int],
    heads: int, kv_heads: int, head_dim: int, block_size: int, unused_blocks: int = 0,
) -> None:  # fmt: skip
    q = guards.put(random_rows(generator, (len(contexts), heads, head_dim), dtype, 1.5))
    k, v = (random_rows(generator, (sum(contexts), kv_heads, head_dim), dtype) for _ in range(2))
    cache = PagedCache.of(k, v, contexts, block_size)
    padding = cache.block_table.new_full((len(contexts), unused_blocks), -1)
    block_table = guards.put(torch.cat([cache.block_table, padding], 1))
    kv_cache = guards.put(cache.kv_cache)
    size = kernels.number("attention_decode_workspace_size", q, kv_cache, block_table)
    workspace = guards.poisoned(size, dtype=torch.float32) if size else None
    out = guards.poisoned(len(contexts), heads * head_dim, dtype=dtype)
    scale = head_dim**-0.5
    kernels.attention_decode(
        out, q, kv_cache, cache.layer_in_block, block_table, guards.put(cache.context_lens), None, scale, workspace
    )
    expected = reference(q, k, v, [1] * len(contexts), contexts, False, scale)
    assert_near(out, expected, 1.0, 1e-4)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1), (6, 1), (10, 1)])
def test_attention_decode(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, heads: int, kv_heads: int,
    head_dim: int,
) -> None:  # fmt: skip
    run(kernels, guards, generator, dtype, [1, 70, 16], heads, kv_heads, head_dim, 16)


@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("contexts", [[300], [63, 64, 65, 127], [128, 129, 260], [600, 1]], ids=str)
@pytest.mark.parametrize("unused_blocks", [0, 100])
def test_splits_of_the_keys(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, contexts: list[int],
    head_dim: int, unused_blocks: int,
) -> None:  # fmt: skip
    # With unused blocks in the table the host expects longer sequences, so that some splits have no keys.
    run(kernels, guards, generator, dtype, contexts, 2, 2, head_dim, 7, unused_blocks)


@pytest.mark.parametrize("window", [1, 63, 64, 130, 700])
@pytest.mark.parametrize("gaps", [0, 60])
@pytest.mark.parametrize("unused_blocks", [0, 100])
@pytest.mark.parametrize("heads", [(2, 2), (6, 1)], ids=str)
def test_windows(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, heads: tuple[int, int],
    unused_blocks: int, gaps: int, window: int,
) -> None:  # fmt: skip
    case = WindowCase.of(generator, [(count, 1) for count in (1, 600, 129, 64)], (*heads, 64), dtype, window, gaps)
    cache = case.cache(7)
    padding = cache.block_table.new_full((4, unused_blocks), -1)
    block_table = guards.put(torch.cat([cache.block_table, padding], 1))
    kv_cache = guards.put(cache.kv_cache)
    size = kernels.number("attention_decode_workspace_size", case.q, kv_cache, block_table)
    workspace = guards.poisoned(size, dtype=torch.float32) if size else None
    out = guards.poisoned(4, heads[0] * 64, dtype=dtype)
    kernels.attention_decode(
        out, guards.put(case.q), kv_cache, cache.layer_in_block, block_table, guards.put(cache.context_lens),
        guards.put(case.first_keys), case.scale, workspace,
    )  # fmt: skip
    assert_near(out, case.reference(torch.float64), 1.0, 1e-4)


@pytest.mark.parametrize("max_blocks", [1, 40])
def test_padding_without_keys_gets_zeros(kernels: Kernels, dtype: torch.dtype, max_blocks: int) -> None:
    cache = torch.ones(40, 1, 2, 1, 16, 16, dtype=dtype)
    q, out = torch.ones(2, 1, 16, dtype=dtype), torch.full((2, 16), float("nan"), dtype=dtype)
    table = torch.arange(max_blocks, dtype=torch.int32).repeat(2, 1)
    workspace = torch.full((kernels.number("attention_decode_workspace_size", q, cache, table),), float("nan"))
    contexts = torch.tensor([3, 0], dtype=torch.int32)
    kernels.attention_decode(out, q, cache, 0, table, contexts, None, 1.0, workspace)
    assert (out[0] == 1).all()
    assert (out[1] == 0).all()


def test_a_missing_or_short_workspace_is_refused(kernels: Kernels, dtype: torch.dtype) -> None:
    cache = torch.zeros(40, 1, 2, 1, 16, 16, dtype=dtype)
    q, out = torch.zeros(1, 1, 16, dtype=dtype), torch.zeros(1, 16, dtype=dtype)
    table, contexts = torch.arange(40, dtype=torch.int32)[None], torch.tensor([600], dtype=torch.int32)
    needed = kernels.number("attention_decode_workspace_size", q, cache, table)
    assert needed > 0
    with pytest.raises(KernelError, match="workspace is None"):
        kernels.attention_decode(out, q, cache, 0, table, contexts, None, 1.0, None)
    with pytest.raises(KernelError, match=f"workspace_size is {needed - 1}, expected {needed} to"):
        kernels.attention_decode(out, q, cache, 0, table, contexts, None, 1.0, torch.zeros(needed - 1))
