"""The numbers in `preprocessor_config.json`, checked before a library makes images of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpn_rt.errors import EngineError
from dpn_rt.schema.bounds import MAX_SIDE
from dpn_rt.schema.text import shown

RESAMPLE = range(6)
"""Pillow's filters."""
MAX_SCALE = 1e6
"""Of means, deviations and factors: pixel values stay finite."""


def check_image_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Refuse numbers that no image could be made of.

    Raises:
        EngineError: all problems, with the file.
    """
    problems = [*_sides(settings), *_colours(settings)]
    if problems:
        raise EngineError(f"{file}: {'; '.join(problems)}")


def _sides(settings: Mapping[str, Any]) -> Iterator[str]:
    for key in ("size", "crop_size", "pad_size"):
        value = settings.get(key)
        sides = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if any(side is not None and not (type(side) is int and 1 <= side <= MAX_SIDE) for side in sides):
            yield f"{key} is {shown(value)}, expected whole numbers from 1 to {MAX_SIDE}"
    resample = settings.get("resample")
    if resample is not None and (type(resample) is not int or resample not in RESAMPLE):
        yield f"resample is {shown(resample)}, expected one of Pillow's filters, 0 to {RESAMPLE[-1]}"


def _colours(settings: Mapping[str, Any]) -> Iterator[str]:
    for key, least in (("image_mean", -MAX_SCALE), ("image_std", 1 / MAX_SCALE), ("rescale_factor", 1 / MAX_SCALE)):
        value = settings.get(key)
        numbers = value if isinstance(value, list) and key != "rescale_factor" else [value]
        if value is not None and not all(_is_within(number, least) for number in numbers):
            yield f"{key} is {shown(value)}, expected numbers from {least:g} to {MAX_SCALE:g}"


def _is_within(number: Any, least: float) -> bool:
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    return is_number and math.isfinite(number) and least <= number <= MAX_SCALE
