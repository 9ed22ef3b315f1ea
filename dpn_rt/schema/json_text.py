"""JSON texts of users' files -> values, within bounds that no honest file comes near."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpn_rt.errors import DpnError
from dpn_rt.schema.files import decoded, read_file
from dpn_rt.schema.text import is_text, shown

MAX_DEPTH = 64
"""Arrays and objects within one another; settings of models have fewer than 10."""
_TOO_DEEP = f"not JSON that is read: nested more than {MAX_DEPTH} deep"
MAX_CONTAINERS = 1_000_000
"""Arrays and objects in all; a header of 100,000 tensors has 300,000."""
MAX_DIGITS = 100
"""Of a whole number; transformers writes 10^30 where it means no limit."""


def read_json(path: Path, error: type[DpnError], most: int) -> Any:
    """The value in a JSON file of at most `most` bytes.

    Raises:
        DpnError: of the class `error`: see `read_file` and `parse_json`.
    """
    return parse_json(read_file(path, error, most), str(path), error)


def parse_json(data: bytes | str, name: str, error: type[DpnError]) -> Any:
    """The value of a JSON text. NaN and infinities are values too: whoever needs a finite number checks that.

    Args:
        data: in UTF-8 where it is bytes.
        name: of the text, for messages.
        error: is raised.

    Raises:
        DpnError: of the class `error`: it is empty, no JSON, nested too deeply, of too
            many parts, or has a number of too many digits.
    """

    def whole_number(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise error(f"{name}: a number of {len(digits)} digits, expected at most {MAX_DIGITS}: {digits[:20]}...")
        return int(digits)

    text = decoded(data, name, error) if isinstance(data, bytes) else data
    if not text.strip():
        raise error(f"{name}: not JSON: it is empty")
    if text.count("[") + text.count("{") > MAX_CONTAINERS:
        raise error(f"{name}: more than {MAX_CONTAINERS:,} arrays and objects")
    try:
        value = json.loads(text, parse_int=whole_number)
    except json.JSONDecodeError as failure:
        near = shown(text[failure.pos : failure.pos + 20])
        where = f"line {failure.lineno}, column {failure.colno}" + (f" at {near}" if near != "''" else "")
        raise error(f"{name}: not JSON (truncated?): {where}") from failure
    except RecursionError as failure:
        raise error(f"{name}: {_TOO_DEEP}") from failure
    problem = _problem(value)
    if problem is not None:
        raise error(f"{name}: {problem}")
    return value


def _problem(value: Any) -> str | None:
    """Why a value cannot be used, whatever it is for."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inside: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inside += [*each, *each.values()]
            elif isinstance(each, list):
                inside += each
            elif isinstance(each, str) and not is_text(each):
                return f"the text {shown(each)} has half of a surrogate pair, expected text that UTF-8 can hold"
        if not inside:
            return None
        level = inside
    return _TOO_DEEP
