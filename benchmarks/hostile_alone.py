"""One hostile body on a server that does nothing else: how long it takes, and how much memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from benchmarks.attacks import ATTACKS, Target
from benchmarks.memory import peak_memory
from benchmarks.soak import serving

ALONE = (
    "10 million empty prompts",
    "15 million lists in lists",
    "a million lists",
    "500,000 unknown keys",
    "8 million ids",
    "30 MB of text",
    "10 MB of text outside ASCII",
    "PNG of a million chunks",
    "a URL of 20 million escapes",
)
"""Kinds whose bodies are large."""
WARM_UP = "JPEG 2000"


@dataclass(frozen=True)
class Alone:
    """What one body did."""

    kind: str
    outcome: str
    """The status of its reply."""
    seconds: float
    """Until the reply, with the time that sending takes."""
    extra_mb: int | None
    """Of both processes of the server at their peak; None where the system does not report it."""


def measure_alone(engine: Path, kind: str) -> Alone:
    """Sends one body of a kind to a server of its own."""
    send = ATTACKS[kind]()
    with serving(engine) as (url, pid):
        address = urlsplit(url)
        target = Target(address.hostname or "", address.port or 0, engine.resolve().name)
        ATTACKS[WARM_UP]()(target)
        processes = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        with peak_memory(processes) as memory:
            started = time.perf_counter()
            outcome = send(target)
            seconds = time.perf_counter() - started
    return Alone(kind, outcome, round(seconds, 3), None if memory.extra is None else memory.extra >> 20)
