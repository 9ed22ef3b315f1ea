"""How a CUDA graph is recorded, on streams that are not there: `tests/backends/kernels/test_graphs.py` needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpn_rt.device.cuda import CudaGraph
from tests.fake_streams import FakeStream


def test_a_step_runs_once_and_is_recorded_beside_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    own, work = FakeStream("its stream", events), FakeStream("the queue", events)
    given: dict[str, Any] = {}

    def graph(recorded: object, **options: Any) -> FakeStream:
        given.update(options, recorded=recorded)
        return FakeStream("the recording", events)

    made = SimpleNamespace(replay=lambda: events.append("replayed"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: work)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    result = (torch.zeros(1),)
    found = CudaGraph(lambda: events.append("runs") or result, own, "a pool")  # type: ignore[arg-type, func-returns-value]
    assert events == [
        "its stream waits for the queue", "on its stream", "runs", "off its stream", "the queue waits for its stream",
        "on the recording", "runs", "off the recording",
    ]  # fmt: skip
    assert given == {"recorded": made, "pool": "a pool", "stream": own, "capture_error_mode": "thread_local"}
    assert found.outputs is result
    found.replay()
    assert events[-1] == "replayed"
