"""Quantised matrices as tiles, in the order in which dot products of processors take them.

A tile holds 16 rows of the matrix and 4 columns (8 bits) or 8 columns (4 bits); numbers are stored without sign. Rows
and columns are filled up with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

TILE_ROWS = 16
INT8_TILE, INT4_TILE = (TILE_ROWS, 4), (TILE_ROWS, 8)
"""Rows and columns."""
GROUP = 128
"""Columns that share a scale in 4 bits."""
INT8_ZERO, INT4_ZERO = 128, 8
"""What is stored for 0."""


def tile_shape(out_features: int, in_features: int, tile: tuple[int, int]) -> tuple[int, int, int, int]:
    """Shape of a matrix in tiles: a tile has 4 bytes a row in either form."""
    return -(-out_features // tile[0]), -(-in_features // tile[1]), tile[0], 4


def panels_of(rows: slice) -> slice:
    """The tiles with these rows of a matrix, which start and end between tiles."""
    assert rows.start % TILE_ROWS == 0 and rows.stop % TILE_ROWS == 0, f"{rows} cuts tiles of {TILE_ROWS} rows"
    return slice(rows.start // TILE_ROWS, rows.stop // TILE_ROWS)


def pack_int8(q: Tensor) -> Tensor:
    """`[out_features, in_features]` int8 -> uint8 tiles `[N / 16, K / 4, 16, 4]`."""
    return _tiles(q, INT8_TILE).add(INT8_ZERO).to(torch.uint8).contiguous()


def unpack_int8(tiles: Tensor) -> Tensor:
    """The matrix of `pack_int8`, int8 `[16 N, 4 K]` of tiles `[N, K, 16, 4]`: rows and columns fill the last tiles."""
    return tiles.bitwise_xor(INT8_ZERO).view(torch.int8).transpose(1, 2).flatten(2).flatten(0, 1)


def pack_int4(q: Tensor) -> Tensor:
    """`[out_features, in_features]` int8, -8 to 7 -> uint8 tiles `[N / 16, K / 8, 16, 4]`: a byte has column k + i in
    its low bits and k + 4 + i in its high bits."""
    both = (_tiles(q, INT4_TILE) + INT4_ZERO).to(torch.uint8)
    return both[..., :4].bitwise_or(both[..., 4:] << 4).contiguous()


def unpack_int4(tiles: Tensor) -> Tensor:
    """The matrix of `pack_int4`, int8 `[16 N, 8 K]` of tiles `[N, K, 16, 4]`: rows and columns fill the last tiles."""
    both = torch.cat((tiles & 15, tiles >> 4), dim=-1)
    return both.to(torch.int8).sub_(INT4_ZERO).transpose(1, 2).flatten(2).flatten(0, 1)


def _tiles(q: Tensor, tile: tuple[int, int]) -> Tensor:
    """`[N / rows, K / columns, rows, columns]` int16."""
    rows, columns = tile
    padded = functional.pad(q.to(torch.int16), (0, -q.shape[1] % columns, 0, -q.shape[0] % rows))
    return padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).transpose(1, 2)
