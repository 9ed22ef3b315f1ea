"""What the workers of peers share: they run in the peers' environment, without dpn_rt.

A worker tries settings of its engine, keeps the fastest for prefill and the fastest for decoding, and then answers one
JSON line per round. Prefill and decoding may use different settings, which favours the peer.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

Clock = time.perf_counter
ROWS, STEPS, TRIES = 640, 8, 3


class Model(Protocol):
    """An engine's model under some settings."""

    def prefill(self, batch: int, rows: int) -> int:
        """All rows of all sequences, until the last row's logits are there; returns rows in the cache times layers."""

    def step(self) -> None:
        """One further token of each sequence."""


def serve(models: Mapping[str, Callable[[], Model]], vision: Callable[[int], None] | None) -> None:
    """Answer the rounds on stdin until it ends.

    Args:
        models: settings by name -> the model under them.
        vision: encodes that many images; None: there is no tower.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    tried = {name: trial(load()) for name, load in models.items()}
    best = {phase: min(tried, key=lambda name: tried[name][phase]) for phase in ("prefill", "decode_step")}
    loaded = {name: models[name]() for name in dict.fromkeys(best.values())}
    print(json.dumps({"tried_seconds": tried, "used": best}), file=replies, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start = Clock()
        if vision is not None:
            vision(asked["batch"])
        times = {"vision": Clock() - start if vision is not None else None}
        times |= measure(loaded[best["prefill"]], loaded[best["decode_step"]], **asked)
        print(json.dumps(times), file=replies, flush=True)


def measure(prefilling: Model, decoding: Model, batch: int, rows: int, steps: int) -> dict[str, float]:
    """Seconds of one round."""
    start = Clock()
    kv_rows = prefilling.prefill(batch, rows)
    prefill = Clock() - start
    if decoding is not prefilling:
        decoding.prefill(batch, rows)
    start = Clock()
    for _ in range(steps):
        decoding.step()
    return {"prefill": prefill, "decode_step": (Clock() - start) / steps, "kv_rows": kv_rows}


def trial(model: Model) -> dict[str, float]:
    """Medians of a few rounds after one that warms up."""
    rounds: list[dict[str, Any]] = [measure(model, model, 1, ROWS, STEPS) for _ in range(1 + TRIES)][1:]
    return {phase: statistics.median(each[phase] for each in rounds) for phase in ("prefill", "decode_step")}
