"""The reference of the attention kernels: torch's own attention, one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as functional

from dpn_rt.ops import CUDA_HEAD_DIMS
from tests.skips import UNSUPPORTED_BY_GPU

# Absolute allowance over torch's error: the effect of the order of additions on float32 scores of these tests.
FLOOR = 5e-6


def require_head_dim(head_dim: int) -> None:
    """Skips the test where the device's kernels do not take this head size."""
    if torch.get_default_device().type == "cuda" and head_dim not in CUDA_HEAD_DIMS:
        pytest.skip(UNSUPPORTED_BY_GPU)


def head_dim_here(head_dim: int) -> int:
    """A head size that the device takes, for one that a strategy drew."""
    is_taken = torch.get_default_device().type == "cpu" or head_dim in CUDA_HEAD_DIMS
    return head_dim if is_taken else CUDA_HEAD_DIMS[head_dim % len(CUDA_HEAD_DIMS)]


def dtype_here(dtype: torch.dtype) -> torch.dtype:
    """float16 instead of float32 where attention takes only 16 bits."""
    is_taken = torch.get_default_device().type == "cpu" or dtype.itemsize == 2
    return dtype if is_taken else torch.float16


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], causal: bool, scale: float
) -> torch.Tensor:
    """q `[num_tokens, num_heads, head_dim]`, k and v `[num_tokens, num_kv_heads, head_dim]`."""
    group = q.shape[1] // k.shape[1]
    outputs = [q.new_empty(0, q.shape[1] * q.shape[2])]
    first = 0
    for length in lengths:
        if length == 0:
            continue
        rows = slice(first, first + length)
        one = [
            x[rows].transpose(0, 1)[None].contiguous() for x in (q, *(x.repeat_interleave(group, 1) for x in (k, v)))
        ]
        out = functional.scaled_dot_product_attention(*one, is_causal=causal, scale=scale)
        outputs.append(out[0].transpose(0, 1).flatten(1))
        first += length
    return torch.cat(outputs)


@dataclass(frozen=True)
class PagedCache:
    """Contiguous keys and values scattered over shuffled blocks of a larger pool, whose other rows are NaN."""

    kv_cache: torch.Tensor  # [num_blocks, layers_per_block, 2, num_kv_heads, block_size, head_dim]
    layer_in_block: int
    block_table: torch.Tensor  # [num_seqs, max_blocks]; unused entries are -1
    context_lens: torch.Tensor  # [num_seqs]

    @staticmethod
    def of(k: torch.Tensor, v: torch.Tensor, lengths: list[int], block_size: int) -> PagedCache:
        """k, v: `[sum of lengths, num_kv_heads, head_dim]`."""
        blocks = [-(-length // block_size) for length in lengths]
        num_blocks = sum(blocks) + 3
        used = torch.randperm(num_blocks)[: sum(blocks)].to(torch.int32).split(blocks)
        cache = torch.full((num_blocks, 2, 2, k.shape[1], block_size, k.shape[2]), float("nan"), dtype=k.dtype)
        table = torch.full((len(lengths), max(blocks, default=0) + 1), -1, dtype=torch.int32)
        for row, own in zip(table, used, strict=True):
            row[: len(own)] = own
        sequences = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        places = torch.cat([torch.arange(length) for length in (0, *lengths)])
        for kind, x in enumerate((k, v)):
            cache[table[sequences, places // block_size], 1, kind, :, places % block_size] = x
        return PagedCache(cache, 1, table, torch.tensor(lengths, dtype=torch.int32))
