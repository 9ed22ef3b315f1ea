"""Keys and values on one device: one tensor of KV blocks for all stages (`block_allocator.py` says whose they are).

All stages share the pool: a layer group has as many layers as divide every stage evenly (the greatest common divisor of
the stage sizes), so a block that one stage frees serves any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpn_rt.cache.block_allocator import BlockIds
from dpn_rt.device.device import Device
from dpn_rt.errors import CapacityError
from dpn_rt.model.config import DecoderConfig


@dataclass(frozen=True)
class KvGeometry:
    """How layers share KV blocks."""

    stage_sizes: tuple[int, ...]
    """Layers per stage."""
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    has_windows: bool = False
    """Whether the pool knows the position of each row, for layers with a sliding window."""

    @classmethod
    def of_model(cls, decoder: DecoderConfig, stage_layers: Sequence[range], dtype: torch.dtype) -> KvGeometry:
        sizes = tuple(len(layers) for layers in stage_layers)
        return cls(sizes, decoder.num_kv_heads, decoder.head_dim, dtype, any(decoder.windows))

    @property
    def layers_per_block(self) -> int:
        """Layers of one layer group."""
        return math.gcd(*self.stage_sizes)

    @property
    def layer_groups(self) -> tuple[int, ...]:
        """Layer groups of each stage."""
        return tuple(size // self.layers_per_block for size in self.stage_sizes)

    def block_shape(self, block_size: int) -> tuple[int, int, int, int, int]:
        """`[layers_per_block, 2, num_kv_heads, block_size, head_dim]`; index 0 of dimension 1 is K, index 1 is V."""
        return self.layers_per_block, 2, self.num_kv_heads, block_size, self.head_dim

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one KV block."""
        positions = block_size * torch.int32.itemsize if self.has_windows else 0
        return math.prod(self.block_shape(block_size)) * self.dtype.itemsize + positions


class KvPool:
    """The KV blocks of one device."""

    def __init__(self, geometry: KvGeometry, num_blocks: int, block_size: int, device: Device) -> None:
        """A pool whose contents are not initialised.

        Raises:
            CapacityError: the device has too little memory.
        """
        self._device = device
        try:
            self.blocks: Tensor = device.pool((num_blocks + 1, *geometry.block_shape(block_size)), geometry.dtype)
            """`[num_blocks + 1, layers_per_block, 2, num_kv_heads, block_size, head_dim]`; the last one is
            `BlockAllocator.padding_block`."""
            self.positions = device.pool((num_blocks + 1, block_size), torch.int32) if geometry.has_windows else None
            """`[num_blocks + 1, block_size]` rotary position of each row, in the blocks of a stage's first layer group.
            None: no layer has a window. Rows that no window reaches any more stay in the cache."""
        except (RuntimeError, MemoryError) as error:
            raise CapacityError(
                f"the memory has no room for a KV cache of {num_blocks * geometry.block_bytes(block_size):,} bytes: "
                "lower kv_cache_bytes"
            ) from error

    @property
    def num_blocks(self) -> int:
        """Without the padding block."""
        return len(self.blocks) - 1

    def copy(self, sources: BlockIds, targets: BlockIds) -> None:
        """Copies blocks `sources` `[num_copies]` to `targets` `[num_copies]`, which are different blocks."""
        source, target = self._device.upload(sources, targets)
        for pool in (self.blocks, self.positions):
            if pool is not None:
                pool.index_copy_(0, target.long(), pool.index_select(0, source))
