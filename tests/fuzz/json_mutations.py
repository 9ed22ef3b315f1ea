"""Changes of JSON documents that keep most of their structure."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from tests.fuzz.byte_mutations import mutate_bytes

Path = tuple[str | int, ...]
NUMBERS = [
    0, -1, 1, 2, 3, 7, 16, 64, 127, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31) - 1, 2**32, 2**53 + 1, 2**63 - 1,
    2**63, -(2**63) - 1, 2**64, 10**30, -0.0, 0.5, 1e-300, 5e-324, 1e30, 1e300, 1.7976931348623157e308, -1e308,
]  # fmt: skip
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "", " ", "\0", "a\0b", "\n", "\x1b[2J", "\ud800", "\udfff\ud800", "\ufeff", "\u202e", "\u0130\u0307", "\uffff",
    "e\u0301" * 50,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "ﷺ" * 30, "a" * 5000, "-1", "NaN", "null", "../../etc/passwd", "%s%n",
    "{{ 7 * 7 }}", "<image>", "<ROUTER>", "</s>", "<s>", "__class__", "data:image/png;base64,", "\u00a0",
]  # fmt: skip
LONG_LIST = 3000
MOST_BYTES = 1 << 18
"""Of a document that grows."""


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """One change of a document; seldom one of its bytes, which may end it."""
    if len(data) > MOST_BYTES or rng.random() < 0.05:
        return mutate_bytes(data[:MOST_BYTES], rng)
    try:
        return encode(mutate_value(json.loads(data), rng))
    except (ValueError, RecursionError):  # it was changed to something else, or nested deeply
        return mutate_bytes(data, rng)


def encode(document: Any) -> bytes:
    """Surrogates and numbers that are not finite are written as Python does."""
    return json.dumps(document).encode()


def mutate_value(document: Any, rng: random.Random) -> Any:
    """The document with one place changed; its own values are copied."""
    document = copy.deepcopy(document)
    places = list(paths(document))
    path = rng.choice(places)
    if not path:
        return _other(document, document, rng)
    parent = at(document, path[:-1])
    kind = rng.choice(("replace", "replace", "replace", "delete", "duplicate", "nest", "move", "grow"))
    if kind == "delete":
        del parent[path[-1]]
    elif kind == "duplicate":
        _duplicate(parent, path[-1], rng)
    elif kind == "nest":
        parent[path[-1]] = _nested(parent[path[-1]], rng)
    elif kind == "move":
        parent[path[-1]] = copy.deepcopy(at(document, rng.choice(places)))
    elif kind == "grow":
        parent[path[-1]] = _grown(parent[path[-1]], rng)
    else:
        parent[path[-1]] = _other(parent[path[-1]], document, rng)
    return document


def paths(value: Any, prefix: Path = ()) -> Iterator[Path]:
    """The places of all values; of a long list of numbers only some."""
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, item) in enumerate(items):
        if number < 64:
            yield from paths(item, (*prefix, key))


def at(value: Any, path: Path) -> Any:
    """The value at a place."""
    for key in path:
        value = value[key]
    return value


def _other(value: Any, document: Any, rng: random.Random) -> Any:
    """Another value, of the same type half of the time."""
    if isinstance(value, bool):
        same: Any = not value
    elif isinstance(value, int):
        same = rng.choice((value + 1, value - 1, -value, value * 2, rng.choice(NUMBERS)))
    elif isinstance(value, float):
        same = rng.choice((*NUMBERS, *NOT_FINITE, -value, value * 1e10))
    elif isinstance(value, str):
        same = rng.choice((rng.choice(TEXTS), value + rng.choice(TEXTS), value[: len(value) // 2], value * 2))
    else:
        same = type(value)() if isinstance(value, list | dict) else None
    others = (None, True, False, [], {}, [[]], [None], {"a": 1}, "a", rng.choice(TEXTS), rng.choice(NUMBERS))
    return same if rng.random() < 0.5 else rng.choice(others)


def _duplicate(parent: Any, key: Any, rng: random.Random) -> None:
    if isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    else:
        parent[rng.choice((f"{key}2", key.upper(), rng.choice(TEXTS)))] = copy.deepcopy(parent[key])


def _nested(value: Any, rng: random.Random) -> Any:
    for _ in range(rng.choice((1, 1, 2, 5, 200))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def _grown(value: Any, rng: random.Random) -> Any:
    many = min(rng.choice((10, 300, LONG_LIST)), MOST_BYTES // len(json.dumps(value)))
    if isinstance(value, list):
        return (value * many)[:LONG_LIST]
    if isinstance(value, dict):
        return {**value, **{f"key{i}": i for i in range(many)}}
    return value * many if isinstance(value, str) and len(value) * many < 10**6 else [value] * many
