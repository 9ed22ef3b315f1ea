"""Headers of safetensors files that lie about the file, themselves or each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpn_rt.errors import CheckpointError
from dpn_rt.format.safetensors_header import HEADER_LIMIT, StoredTensor, read_header

TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: bytes | dict[str, Any], data: bytes = b"\0" * 8, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {**TWO, "shape": [-2]}}, "expected whole numbers of at least 0 as shape"),
        ({"a": {**TWO, "shape": [2.0]}}, "expected whole numbers"),
        ({"a": {**TWO, "shape": [True]}}, "expected whole numbers"),
        ({"a": {**TWO, "shape": "12"}}, "expected whole numbers"),
        ({"a": {**TWO, "shape": [2**60, 2**60]}}, "expected whole numbers"),
        ({"a": {**TWO, "shape": [2**50, 2**50]}}, f"expected {4 * 2**100} bytes between its data_offsets"),
        ({"a": {**TWO, "shape": [1] * 17}}, "expected whole numbers"),
        ({"a": {**TWO, "shape": [3]}}, "expected 12 bytes between its data_offsets"),
        ({"a": {**TWO, "data_offsets": [8, 0]}}, "expected 8 bytes between its data_offsets"),
        ({"a": {**TWO, "data_offsets": [-8, 0]}}, "expected whole numbers"),
        ({"a": {**TWO, "data_offsets": [8]}}, "and two as data_offsets"),
        ({"a": {**TWO, "dtype": [1]}}, "expected dtype, shape and data_offsets"),
        ({"a": []}, "header entry of 'a' is [], expected dtype"),
        ({"a": TWO, "b": TWO}, "'b' has the bytes 0 to 8, expected them to begin at 8"),
        ({"a": {**TWO, "data_offsets": [8, 16]}}, "'a' has the bytes 8 to 16, expected them to begin at 0"),
        ({"a": {**TWO, "shape": [20], "data_offsets": [0, 80]}}, "its tensors take 80 bytes, it has 8 for them"),
        ({}, "its tensors take 0 bytes, it has 8 for them"),
        (b"[]", "its header is no JSON object"),
        (b"", "its header: not JSON: it is empty"),
        (b"{", "its header: not JSON"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b'{"a":{"shape":[' + b"9" * 5000 + b"]}}", "a number of 5000 digits"),
        (b'{"\xff":1}', "byte 2 is 0xff, expected text in UTF-8"),
        (b'{"a":NaN}', "header entry of 'a' is nan"),
        (b" " * (HEADER_LIMIT + 1), "header of 16,777,217 bytes, expected at most 16,777,216"),
    ],
)
def test_refused(tmp_path: Path, header: bytes | dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as info:
        read_header(write(tmp_path / "x", header), CheckpointError)
    assert message in str(info.value) and str(tmp_path / "x") in str(info.value)


@pytest.mark.parametrize("length", [10**6, 2**63, 2**64 - 1])
def test_lengths_beyond_the_file(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match=f"header of {length} bytes in a file of "):
        read_header(write(tmp_path / "x", {"a": TWO}, length=length), CheckpointError)
    (tmp_path / "x").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="in a file of 3 bytes"):
        read_header(tmp_path / "x", CheckpointError)


def test_read(tmp_path: Path) -> None:
    entries = {"__metadata__": {"format": "pt"}, "a": TWO, "b": {"dtype": "F4", "shape": [], "data_offsets": [8, 9]}}
    header = read_header(write(tmp_path / "x", entries, bytes(9)), CheckpointError)
    assert header.tensors == {"a": StoredTensor("F32", (2,), 0, 8), "b": StoredTensor("F4", (), 8, 9)}
    assert header.size + 9 == (tmp_path / "x").stat().st_size
