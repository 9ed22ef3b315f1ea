from __future__ import annotations

import pytest
import torch

from dpn_rt.model.weights.tiles import INT4_TILE, INT8_TILE, pack_int4, pack_int8, tile_shape, unpack_int4, unpack_int8

SIZES = [(0, 8), (5, 0), (1, 1), (16, 4), (16, 8), (17, 9), (31, 129), (48, 64)]


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_8_bits_lie_in_quads_of_columns(shape: tuple[int, int]) -> None:
    q = torch.randint(-127, 128, shape, dtype=torch.int8)
    tiles = pack_int8(q)
    assert (tiles.shape, tiles.dtype, tiles.is_contiguous()) == (tile_shape(*shape, INT8_TILE), torch.uint8, True)
    expected = torch.full((tiles.shape[0] * 16, tiles.shape[1] * 4), 128)
    expected[: shape[0], : shape[1]] = q.to(torch.int64) + 128
    for p, j, n, i in torch.cartesian_prod(*map(torch.arange, tiles.shape)):
        assert tiles[p, j, n, i] == expected[16 * p + n, 4 * j + i]
    assert torch.equal(unpack_int8(tiles)[: shape[0], : shape[1]], q)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_4_bits_lie_in_two_quads_of_columns(shape: tuple[int, int]) -> None:
    q = torch.randint(-8, 8, shape, dtype=torch.int8)
    tiles = pack_int4(q)
    assert (tiles.shape, tiles.dtype, tiles.is_contiguous()) == (tile_shape(*shape, INT4_TILE), torch.uint8, True)
    expected = torch.full((tiles.shape[0] * 16, tiles.shape[1] * 8), 8)
    expected[: shape[0], : shape[1]] = q.to(torch.int64) + 8
    for p, j, n, i in torch.cartesian_prod(*map(torch.arange, tiles.shape)):
        row, column = 16 * p + n, 8 * j + i
        assert tiles[p, j, n, i] == expected[row, column] + 16 * expected[row, column + 4]
    assert torch.equal(unpack_int4(tiles)[: shape[0], : shape[1]], q)
