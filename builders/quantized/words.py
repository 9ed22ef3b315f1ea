"""Small integers in words of 32 bits."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (4, 8)
"""Of the integers that are read."""
WORD = 32


def num_words(count: int, bits: int) -> int:
    """Words that `count` integers take, the last one perhaps in part."""
    return -(-count * bits // WORD)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The integers of each row, the lowest bits of a word first.

    Args:
        words: `[num_rows, num_words]` int32.
        bits: 4 or 8.
        count: of integers in a row.

    Returns:
        `[num_rows, count]` uint8.
    """
    fields = words.contiguous().view(torch.uint8)  # little-endian, as every processor that this runs on
    if bits == 4:
        fields = torch.stack((fields & 15, fields >> 4), dim=-1).flatten(1)
    return fields[:, :count]


def centred(fields: Tensor, bits: int) -> Tensor:
    """Integers from 0 as int8, 2^(bits - 1) less."""
    return (fields.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
