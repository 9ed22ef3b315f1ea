"""docs/cuda.md names every op that has kernels for GPUs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from dpn_rt import ops

ON_THE_CPU = {"depthwise_conv", "embedding", "linear", "linear_int4", "linear_int8"}
"""Ops of the CPU alone: on a GPU torch has them."""


def test_the_table_of_kernels_has_every_op() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cuda.md").read_text(encoding="utf-8")
    table = text.partition("## Kernels and launches")[2].partition("\n## ")[0]
    named = {name for line in table.splitlines() if line.startswith("| `")
             for name in re.findall(r"`(\w+)`", line.split("|")[1])}  # fmt: skip
    functions = {name for name, found in vars(ops).items() if inspect.isfunction(found) and "isa" not in name}
    assert named == functions - ON_THE_CPU
