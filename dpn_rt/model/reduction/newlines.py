"""Newline rows: rows of an image in tiles that end the lines of its grid, as a text's newlines do.

They stand between visual tokens and are text to every reducer: none is ever left out. Reducers number an image's visual
tokens from 0 without them; here are the rules between these numbers and the image's rows.
"""

from __future__ import annotations

import numpy as np

from dpn_rt.model.reduction.grid import IntArray

NO_NEWLINES: IntArray = np.empty(0, dtype=np.int32)
NO_NEWLINES.setflags(write=False)


def visual_rows(num_rows: int, newline_rows: IntArray) -> IntArray:
    """`[num_visual]` row of each visual token.

    Args:
        num_rows: of the image, newline rows included.
        newline_rows: `[num_newlines]` ascending.
    """
    is_visual = np.ones(num_rows, dtype=bool)
    is_visual[newline_rows] = False
    return np.flatnonzero(is_visual).astype(np.int32)


def rows_of(tokens: IntArray, num_rows: int, newline_rows: IntArray) -> IntArray:
    """`[num_tokens + num_newlines]` ascending rows of an image that stay where only these visual tokens do.

    Args:
        tokens: `[num_tokens]` ascending numbers of visual tokens.
        num_rows: of the image, newline rows included.
        newline_rows: `[num_newlines]` ascending.
    """
    stays = np.zeros(num_rows, dtype=bool)
    stays[visual_rows(num_rows, newline_rows)[tokens]] = True
    stays[newline_rows] = True
    return np.flatnonzero(stays).astype(np.int32)


def tokens_of(rows: IntArray, newline_rows: IntArray) -> IntArray:
    """`[num_tokens]` numbers of the visual tokens among some rows of an image: the inverse of `rows_of`.

    Args:
        rows: ascending, all newline rows among them.
        newline_rows: `[num_newlines]` ascending.
    """
    if not len(newline_rows):
        return rows
    tokens = rows[~np.isin(rows, newline_rows, assume_unique=True)]
    return (tokens - np.searchsorted(newline_rows, tokens)).astype(np.int32)


def newlines_among(rows: IntArray, newline_rows: IntArray) -> IntArray:
    """`[num_newlines]` where the newline rows are once only `rows` are left, among which they are."""
    return np.searchsorted(rows, newline_rows).astype(np.int32)
