"""Layers whose weights are split over the ranks of an engine, and what the ranks must be able to do together.

Column-parallel layers (queries, keys and values; gate and up) need nothing of this: each rank has some of their
outputs. Row-parallel ones, which come after, bring the ranks together again, in one of two ways. Embeddings and output
layer are split by the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dpn_rt.model.linear import load_linear
from dpn_rt.model.weights.dense import DenseWeight
from dpn_rt.model.weights.forms import form_of
from dpn_rt.model.weights.tiles import TILE_ROWS


class RankGroup(Protocol):
    """The ranks that share one decoder. All of them make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """Of this process, from 0."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, in its memory; the same bits on every rank."""

    def join(self, x: Tensor) -> Tensor:
        """`[num_rows, columns]` of each rank side by side, in the order of ranks: `[num_rows, size * columns]`."""


Product = Callable[[Tensor], Tensor]
"""`[num_rows, in_features]` -> `[num_rows, out_features]`."""


def summed(linear: Product, group: RankGroup) -> Product:
    """A row-parallel layer: each rank has some columns of its matrix, multiplies its part of `x`, and all sum up."""
    return lambda x: group.sum(linear(x))


def joined(linear: Product, group: RankGroup) -> Product:
    """The same for a matrix in 8 or 4 bits: each rank has some of its rows; parts of `x` are joined, then the results.

    Such products round a row of `x` by its largest value, which no rank's part tells. So every rank takes the whole
    row, and the result has the same bits as without ranks. It moves more than a sum: `x` besides the result.
    """
    return lambda x: group.join(linear(group.join(x)))


def load_row_parallel(
    tensors: Mapping[str, Tensor], module: str, group: RankGroup | None, *, prepack: bool, ragged: bool = True
) -> Product:
    """The second layer of a `LayerPair`.

    Args:
        tensors: of an engine, or of one rank's part.
        module: canonical name.
        group: the ranks that share it; None: it is whole.
        prepack: as of `Weight.load`.
        ragged: as of `Weight.products`.
    """
    linear = load_linear(tensors, module, prepack=prepack, ragged=ragged)
    if group is None:
        return linear
    return summed(linear, group) if form_of(tensors, module) is DenseWeight else joined(linear, group)


def vocabulary_parts(vocab_size: int, size: int) -> list[slice]:
    """Rows of embeddings and output layer that each rank has: whole tiles, so that all forms of matrices can be cut.

    The last part ends with the last tile, which the vocabulary may not fill.
    """
    num_tiles = -(-vocab_size // TILE_ROWS)
    ends = [rank * num_tiles // size * TILE_ROWS for rank in range(size + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


def shared_embedding(rows: Callable[[Tensor], Tensor], vocab_size: int, group: RankGroup) -> Callable[[Tensor], Tensor]:
    """Token ids to rows of a table of which each rank has a part.

    A rank gives zeros for ids of the others, and all sum up, which changes no bit of a row.

    Args:
        rows: of this rank's part: `[num_tokens]` ids, counted from its first -> `[num_tokens, hidden_size]`.
        vocab_size: of all ranks.
        group: the ranks.
    """
    part = vocabulary_parts(vocab_size, group.size)[group.rank]
    last = min(part.stop, vocab_size) - part.start - 1

    def embed(token_ids: Tensor) -> Tensor:
        own = token_ids - part.start
        is_other = (own < 0) | (own > last)
        return group.sum(rows(own.clamp(0, last)).masked_fill_(is_other[:, None], 0))

    return embed


def shared_head(head: Product, vocab_size: int, group: RankGroup) -> Product:
    """An output layer of which each rank has a part of the vocabulary: parts of the logits are joined."""
    parts = vocabulary_parts(vocab_size, group.size)
    widths = [min(part.stop, vocab_size) - part.start for part in parts]
    most = max(widths)

    def logits(x: Tensor) -> Tensor:
        own = head(x)
        joint = group.join(functional.pad(own, (0, most - own.shape[1])))
        if min(widths) == most:
            return joint
        padded = torch.split(joint, most, dim=1)
        return torch.cat([part[:, :width] for part, width in zip(padded, widths, strict=True)], dim=1)

    return logits
