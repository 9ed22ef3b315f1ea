from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_rt.cache.kv_cache import KvCache, KvCacheConfig, KvGeometry
from dpn_rt.errors import CapacityError
from dpn_rt.format.config import stage_layers
from tests.engine.models import DECODER, PYRAMID

GEOMETRY = KvGeometry((4, 2, 6), num_kv_heads=2, head_dim=8, dtype=torch.float32)


def make_cache(num_cells: int = 400, num_slots: int = 4) -> KvCache:
    return KvCache(GEOMETRY, KvCacheConfig(num_cells, block_size=4, num_slots=num_slots, max_length=64))


def owned_cells(cache: KvCache, slots: list[int]) -> list[int]:
    cells: list[int] = []
    for stage in range(len(GEOMETRY.stage_sizes)):
        for slot in slots:
            blocks = -(-int(cache.lengths(np.array([slot]))[0, stage]) // cache.config.block_size)
            cells += cache.block_tables(stage, np.array([slot]))[:, 0, :blocks].flatten().tolist()
    return cells


def test_geometry_of_a_model() -> None:
    geometry = KvGeometry.of_model(DECODER, stage_layers(PYRAMID.layers, 7), torch.bfloat16)
    assert geometry.stage_sizes == (2, 1, 2, 2)
    assert geometry.layers_per_cell == 1
    deep = KvGeometry.of_model(DECODER, stage_layers((), 7), torch.bfloat16)
    assert (deep.layers_per_cell, deep.groups) == (7, (1,))
    sizes = KvGeometry.of_model(DECODER, stage_layers((3,), 7), torch.bfloat16)
    assert sizes.stage_sizes == (4, 3)
    assert GEOMETRY.layers_per_cell == 2
    assert GEOMETRY.groups == (2, 1, 3)
    assert GEOMETRY.cell_bytes(4) == 2 * 2 * 2 * 4 * 8 * 4


def test_bytes_are_the_stage_lengths_up_to_block_rounding() -> None:
    cache = make_cache()
    slot = cache.open_slot()
    lengths = (9, 4, 1)
    for stage, length in enumerate(lengths):
        cache.fill_stage(stage, np.array([slot]), np.array([length], dtype=np.int32))
    row_bytes = 2 * GEOMETRY.num_kv_heads * GEOMETRY.head_dim * 4  # K and V of one layer
    exact = sum(layers * length * row_bytes for layers, length in zip(GEOMETRY.stage_sizes, lengths, strict=True))
    rounded = sum(layers * -(-n // 4) * 4 * row_bytes for layers, n in zip(GEOMETRY.stage_sizes, lengths, strict=True))
    assert exact <= cache.bytes_in_use == rounded


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["open", "grow", "trim", "close"]), st.integers(0, 63)), max_size=40))
def test_cells_belong_to_one_owner(actions: list[tuple[str, int]]) -> None:
    cache, slots = make_cache(), []
    for action, value in actions:
        if action == "open" and cache.num_free_slots:
            slot = cache.open_slot()
            lengths = [value % 50, value % 7, value % 20]
            for stage, length in enumerate(lengths):
                cache.fill_stage(stage, np.array([slot]), np.array([length], dtype=np.int32))
            slots.append(slot)
        elif action == "grow" and slots:
            if cache.lengths(np.array(slots)).max() < cache.config.max_length:
                needed, free = cache.cells_to_grow(np.array(slots)), cache.num_free_cells
                cache.grow(np.array(slots))
                assert free - cache.num_free_cells == needed
        elif action == "trim" and slots:
            stage, chosen = value % 3, np.array(slots[value % len(slots) :])
            lengths = np.maximum(cache.lengths(chosen)[:, stage] - value % 9, 0)
            cache.trim_stage(stage, chosen, lengths)
            assert cache.lengths(chosen)[:, stage].tolist() == lengths.tolist()
            tables = cache.block_tables(stage, chosen, whole=True)
            used = np.arange(tables.shape[2]) < -(-lengths[:, None] // cache.config.block_size)
            assert (tables[:, ~used] == -1).all()
        elif action == "close" and slots:
            cache.close_slot(slots.pop(value % len(slots)))
        cells = owned_cells(cache, slots)
        assert len(cells) == len(set(cells)) == cache.config.num_cells - cache.num_free_cells
        assert all(0 <= cell < cache.config.num_cells for cell in cells)
    for slot in slots:
        cache.close_slot(slot)
    assert cache.num_free_cells == cache.config.num_cells


def test_unused_cells_are_enough_or_not() -> None:
    cache = make_cache(num_cells=6, num_slots=2)
    slots = np.array([cache.open_slot(), cache.open_slot()])
    for lengths, enough in (([4, 8], True), ([9, 0], True), ([9, 1], False)):  # blocks of 2 cells
        assert cache.has_unused_for(0, slots, np.array(lengths, dtype=np.int32)) == enough
    cache.fill_stage(0, slots, np.array([4, 4], dtype=np.int32))
    assert cache.has_unused_for(0, slots, np.array([8, 4], dtype=np.int32))
    assert not cache.has_unused_for(0, slots, np.array([5, 5], dtype=np.int32))


def test_more_than_there_is_changes_nothing() -> None:
    cache = make_cache(num_cells=5, num_slots=1)
    slot = cache.open_slot()
    with pytest.raises(CapacityError, match="all 1 sequence slots"):
        cache.open_slot()
    with pytest.raises(CapacityError, match="5 free cells, 6 are needed"):
        cache.fill_stage(2, np.array([slot]), np.array([5], dtype=np.int32))
    assert cache.num_free_cells == 5
    cache.fill_stage(2, np.array([slot]), np.array([4], dtype=np.int32))
    with pytest.raises(CapacityError):
        cache.grow(np.array([slot]))
    assert cache.num_free_cells == 2
    assert cache.lengths(np.array([slot])).tolist() == [[0, 0, 4]]
