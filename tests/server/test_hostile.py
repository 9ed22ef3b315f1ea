"""Hostile clients of every kind, once each. `python -m benchmarks.hostile` is the long version, with times."""

from __future__ import annotations

from pathlib import Path

from benchmarks.hostile import hostile
from benchmarks.load.attacks import ATTACKS

SERVED = (
    "an animation of 500 frames",
    "TIFF of 500 directories",
    "PNG of 16 million pixels of 64 bits",
    "PNG with a transparent colour",
    "WebP of 16 million pixels",
    "a million ids to text",
    "a million images to text",
)
"""Only the first picture of a file is read."""


def test_every_kind_of_attack_is_survived(engine_dir: Path) -> None:
    rows = hostile(engine_dir, ATTACKS, seconds=0, clients=1)
    assert [row.kind for row in rows] == list(ATTACKS)
    for row in rows:
        assert row.survived, row
        if row.kind in SERVED:
            assert set(row.outcomes) == {"200"}
        elif "left" not in row.outcomes:
            assert row.refused == row.tried, row
