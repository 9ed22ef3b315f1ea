"""The header of a safetensors file, checked against the file before anything is computed with it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from dpn_rt.errors import DpnError
from dpn_rt.schema.bounds import LARGEST_INT
from dpn_rt.schema.files import open_file
from dpn_rt.schema.json_text import parse_json
from dpn_rt.schema.text import shown

MAX_DIMENSIONS = 16
HEADER_LIMIT = 16 << 20
"""Largest header in bytes: some 100,000 tensors in one file. The format allows 100 MB, published files have less than
10 MB."""

_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32}
_BITS |= {"F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a header."""

    dtype: str
    """As the format names it, such as BF16."""
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the end of the header."""
    end: int


@dataclass(frozen=True)
class Header:
    """What a file holds."""

    tensors: dict[str, StoredTensor]
    """By name, in the order of the header."""
    size: int
    """Bytes before the first tensor."""


def read_header(path: Path, error: type[DpnError]) -> Header:
    """The header of a file whose tensors fill the rest of it without gaps, as the format asks.

    Raises:
        DpnError: of the class `error`: the file is none, or is truncated or damaged; says where.
    """
    try:
        with open_file(path, error) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise error(f"{path}: truncated or damaged: header of {length} bytes in a file of {size} bytes")
            if length > HEADER_LIMIT:
                raise error(f"{path}: header of {length:,} bytes, expected at most {HEADER_LIMIT:,}")
            text = file.read(length)
    except OSError as failure:
        raise error(f"{path}: cannot be read: {failure.strerror}") from failure
    entries = parse_json(text, f"{path}: truncated or damaged: its header", error)
    if not isinstance(entries, dict):
        raise error(f"{path}: truncated or damaged: its header is no JSON object")
    entries.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, error) for name, entry in entries.items()}
    _check_places(path, tensors, size - 8 - length, error)
    return Header(tensors, 8 + length)


def _tensor(path: Path, name: str, entry: Any, error: type[DpnError]) -> StoredTensor:
    damaged = f"{path}: truncated or damaged: header entry of {shown(name)} is {shown(entry)}"
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise error(f"{damaged}, expected dtype, shape and data_offsets")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        raise error(f"{damaged}, expected whole numbers of at least 0 as shape and two as data_offsets")
    begin, end = offsets
    bits = _BITS.get(entry["dtype"])
    if bits is not None and math.prod(shape) * bits != (end - begin) * 8:
        raise error(f"{damaged}, expected {math.prod(shape) * bits // 8} bytes between its data_offsets")
    return StoredTensor(entry["dtype"], tuple(shape), begin, end)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= LARGEST_INT for value in values)


def _check_places(path: Path, tensors: dict[str, StoredTensor], num_bytes: int, error: type[DpnError]) -> None:
    """Refuse tensors that overlap, leave gaps, or end before or after the file does."""
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != at or tensor.end < at:
            raise error(
                f"{path}: truncated or damaged: {shown(name)} has the bytes {tensor.begin} to {tensor.end}, expected "
                f"them to begin at {at}, where the tensor before ends"
            )
        at = tensor.end
    if at != num_bytes:
        raise error(f"{path}: truncated or damaged: its tensors take {at:,} bytes, it has {num_bytes:,} for them")
