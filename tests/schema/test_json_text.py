"""JSON of users' files: what is refused, and that it is said in our words."""

from __future__ import annotations

import math

import pytest

from dpn_rt.errors import CheckpointError
from dpn_rt.schema.json_text import MAX_DEPTH, parse_json


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON: it is empty"),
        (b" \n", "not JSON: it is empty"),
        (b'{"a": ', "not JSON (truncated?): line 1, column 7"),
        (b"\0\0", r"not JSON (truncated?): line 1, column 1 at '\x00\x00'"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b'{"a":' * 100_000, "nested more than 64 deep"),
        (b"[" * 900 + b"]" * 900, "nested more than 64 deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested more than 64 deep"),
        (b"[" + b"{}," * 1_000_000 + b"[]]", "more than 1,000,000 arrays and objects"),
        (b"[" + b"9" * 5000 + b"]", "a number of 5000 digits, expected at most 100: 99999999999999999999..."),
        (b"-" + b"9" * 101, "a number of 102 digits"),
        (b'"\xff"', "byte 1 is 0xff, expected text in UTF-8"),
        ('"a"'.encode("utf-16"), "byte 0 is 0xff, expected text in UTF-8"),
        (b'{"\\ud800": 1}', r"the text '\ud800' has half of a surrogate pair"),
        (b'[{"a": "\\udc00"}]', r"the text '\udc00' has half of a surrogate pair"),
    ],
)
def test_refused(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError) as info:
        parse_json(data, "x.json", CheckpointError)
    assert str(info.value).startswith("x.json: ") and message in str(info.value)


def test_read() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, 1.5, null]}', "x", CheckpointError) == {"a": [1, 1.5, None]}
    assert parse_json(b'{"a": 1, "a": 2}', "x", CheckpointError) == {"a": 2}
    assert parse_json(b"1" + b"0" * 30, "x", CheckpointError) == 10**30
    assert math.isnan(parse_json(b"NaN", "x", CheckpointError))
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x", CheckpointError)
