"""Values and lists in error messages."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from PIL import Image

from dpn_rt.schema.text import MAX_ITEMS, MAX_SHOWN, few, shown


@pytest.mark.parametrize("number", [0, 1, MAX_ITEMS])
def test_a_short_list_is_shown_whole(number: int) -> None:
    assert few([str(item) for item in range(number)]) == ", ".join(map(str, range(number)))


def test_a_long_list_says_how_many_more() -> None:
    assert few(["a"] * (MAX_ITEMS + 1234), "; ") == "; ".join(["a"] * MAX_ITEMS) + "; and 1,234 more"


class Bare:
    pass


PICTURE = Image.new("RGB", (2, 2))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Bare(), "Bare"),
        (object(), "object"),
        (PICTURE, "Image"),
        (len, "<built-in function len>"),
        (lambda: 1, "function"),
        (Bare().__init__, "method-wrapper"),
        ([1, PICTURE, "a"], "[1, Image, 'a']"),
        ((Bare(),), "(Bare,)"),
        ({"type": "image", "image": [PICTURE]}, "{'type': 'image', 'image': [Image]}"),
        ({Bare(): {object()}}, "{Bare: {object}}"),
        ("<object object at 0x7f0000000000>", "'<object object at 0x7f0000000000>'"),
        (Path("a"), "PosixPath('a')"),
        (1.5, "1.5"),
        (None, "None"),
    ],
)
def test_objects_are_shown_by_their_types(value: object, text: str) -> None:
    assert shown(value) == text


def test_a_deep_value_is_shown() -> None:
    value: list[object] = []
    value.append(value)
    assert shown(value).startswith("[[[")
    nested: list[object] = []
    for _ in range(500):
        nested = [nested]
    assert shown(nested).startswith("[[[")


@given(st.integers(1, 2 * MAX_ITEMS), st.integers(0, 5000))
def test_no_item_of_a_list_is_long(number: int, length: int) -> None:
    text = few(["x" * length] * number)
    assert len(text) <= MAX_ITEMS * (MAX_SHOWN + 2) + len("and 40 more")
    assert text.startswith("x" * min(length, MAX_SHOWN - 3))


@given(st.recursive(st.integers() | st.text() | st.binary(), lambda inner: st.lists(inner, max_size=300)))
def test_a_value_is_shown_as_python_writes_it_or_cut(value: object) -> None:
    text = shown(value)
    assert len(text) <= MAX_SHOWN
    assert text == repr(value) or (text.endswith("...") and repr(value).startswith(text[:-3]))
