"""Tables in which an image is given once: cells of other rows name the `index` of its row, as MMBench's do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeGuard

from dpn_rt.evaluate.readers.rows import BadRow, Row

INDEX, IMAGE = "index", "image"
Rows = Callable[[], Iterator[Row | BadRow]]
"""Reads a table from its start."""


def with_images(rows: Rows) -> Iterator[Row | BadRow]:
    """The rows, with the image itself in each cell that names a row. One that names a row without image is told.

    A table with such cells is read again instead of kept, since it may be larger than the memory; only images that are
    named are kept.
    """
    images: dict[int, str] | None = None
    for row in rows():
        if not _names_a_row(row):
            yield row
            continue
        images = _named_images(rows) if images is None else images
        if image := images.get(row.values[IMAGE]):
            yield dataclasses.replace(row, values={**row.values, IMAGE: image})
        else:
            reason = f"image {row.values[IMAGE]}: expected an image, or the {INDEX} of a row that has one"
            yield BadRow(row.place, row.values[INDEX], reason)


def _named_images(rows: Rows) -> dict[int, str]:
    named = {row.values[IMAGE] for row in rows() if _names_a_row(row)}
    return {
        row.values[INDEX]: row.values[IMAGE]
        for row in rows()
        if isinstance(row, Row) and row.values[INDEX] in named and isinstance(row.values[IMAGE], str)
    }


def _names_a_row(row: Row | BadRow) -> TypeGuard[Row]:
    return isinstance(row, Row) and INDEX in row.values and isinstance(row.values.get(IMAGE), int)
