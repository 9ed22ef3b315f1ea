"""How the time of a GPU's work is measured, on a GPU that is not there."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measuring import clock


def test_a_gpu_is_busy_while_work_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.is_timed = enable_timing

        def record(self) -> None:
            events.append("event")

        def synchronize(self) -> None:
            events.append("wait")

        def elapsed_time(self, end: Event) -> float:
            assert self.is_timed and end.is_timed
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: events.append("idle"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: events.append(f"sleeps {cycles}"), raising=False)
    assert clock.seconds(lambda: events.append("work"), "cuda") == pytest.approx(0.003)
    expected = ["idle", f"sleeps {clock.SLEEP_CYCLES}", "event", "work", "event", "wait"]
    assert events == expected
    monkeypatch.delattr(torch.cuda, "_sleep")  # later versions of torch need not have it
    events.clear()
    clock.seconds(lambda: events.append("work"), "cuda")
    assert events == expected[:1] + expected[2:]
