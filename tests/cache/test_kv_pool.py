"""The tensor of KV blocks: its shape, copies of blocks, and the error when it does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from dpn_rt.cache.kv_pool import KvGeometry, KvPool
from dpn_rt.device.host import HostDevice
from dpn_rt.errors import CapacityError
from dpn_rt.format.config import stage_layers
from tests.engine.models import DECODER, PYRAMID

GEOMETRY = KvGeometry((4, 2, 6), num_kv_heads=2, head_dim=8, dtype=torch.float32)


def test_geometry_of_a_model() -> None:
    geometry = KvGeometry.of_model(DECODER, stage_layers(PYRAMID.layers, 7), torch.bfloat16)
    assert geometry.stage_sizes == (2, 1, 2, 2)
    assert (geometry.layers_per_block, geometry.layer_groups) == (1, (2, 1, 2, 2))
    deep = KvGeometry.of_model(DECODER, stage_layers((), 7), torch.bfloat16)
    assert (deep.layers_per_block, deep.layer_groups) == (7, (1,))
    sizes = KvGeometry.of_model(DECODER, stage_layers((3,), 7), torch.bfloat16)
    assert (sizes.stage_sizes, sizes.layers_per_block, sizes.layer_groups) == ((4, 3), 1, (4, 3))
    assert GEOMETRY.layers_per_block == 2
    assert GEOMETRY.layer_groups == (2, 1, 3)
    assert GEOMETRY.block_bytes(4) == 2 * 2 * 2 * 4 * 8 * 4


def test_a_block_group_holds_the_rows_of_all_layers_of_its_stage() -> None:
    row_bytes = 2 * GEOMETRY.num_kv_heads * GEOMETRY.head_dim * 4  # K and V of one layer
    for groups, layers in zip(GEOMETRY.layer_groups, GEOMETRY.stage_sizes, strict=True):
        assert groups * GEOMETRY.block_bytes(4) == layers * 4 * row_bytes


def test_shape_with_the_padding_block() -> None:
    assert KvPool(GEOMETRY, 5, 4, HostDevice()).blocks.shape == (6, 2, 2, 2, 4, 8)


def test_copies_change_their_targets_alone() -> None:
    pool = KvPool(GEOMETRY, 9, 4, HostDevice())
    pool.blocks.copy_(torch.randn(pool.blocks.shape))
    before = pool.blocks.clone()
    pool.copy(np.array([7, 0, 7], dtype=np.int32), np.array([3, 8, 1], dtype=np.int32))
    expected = before.clone()
    for source, target in ((7, 3), (0, 8), (7, 1)):
        expected[target] = before[source]
    assert torch.equal(pool.blocks, expected)


def test_positions_of_rows_are_there_where_a_layer_has_a_window() -> None:
    windowed = dataclasses.replace(GEOMETRY, has_windows=True)
    assert windowed.block_bytes(4) == GEOMETRY.block_bytes(4) + 4 * 4
    assert KvPool(GEOMETRY, 9, 4, HostDevice()).positions is None
    pool = KvPool(windowed, 9, 4, HostDevice())
    assert pool.positions is not None and pool.positions.shape == (10, 4)
    pool.positions.copy_(torch.arange(40).view(10, 4))
    pool.copy(np.array([7, 0], dtype=np.int32), np.array([3, 8], dtype=np.int32))
    assert pool.positions[[3, 8]].tolist() == pool.positions[[7, 0]].tolist() == [[28, 29, 30, 31], [0, 1, 2, 3]]
    stages = stage_layers(PYRAMID.layers, 7)
    for windows, expected in ((), False), ((None,) * 7, False), ((None,) * 6 + (9,), True):
        decoder = dataclasses.replace(DECODER, windows=windows)
        assert KvGeometry.of_model(decoder, stages, torch.bfloat16).has_windows == expected


class FullDevice(HostDevice):
    def pool(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_pool_that_does_not_fit() -> None:
    with pytest.raises(CapacityError, match="no room for a KV cache of 5,120 bytes: lower kv_cache_bytes"):
        KvPool(GEOMETRY, 5, 4, FullDevice())
