"""How a CUDA graph is recorded, on streams that are not there: `tests/backends/kernels/test_graphs.py` needs a GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpn_rt.device.cuda import CudaGraph, without_collector
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
    is_collecting: list[bool] = []

    def step() -> tuple[torch.Tensor, ...]:
        is_collecting.append(gc.isenabled())
        events.append("runs")
        return result

    gc.enable()
    found = CudaGraph(step, own, "a pool")  # type: ignore[arg-type]
    assert is_collecting == [True, False] and gc.isenabled(), "garbage is not collected while a graph is recorded"
    assert events == [
        "its stream waits for the queue", "on its stream", "runs", "off its stream", "the queue waits for its stream",
        "on the recording", "runs", "off the recording",
    ]  # fmt: skip
    assert given == {"recorded": made, "pool": "a pool", "stream": own, "capture_error_mode": "thread_local"}
    assert found.outputs is result
    found.replay()
    assert events[-1] == "replayed"


@pytest.fixture
def collector() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("is_enabled", [True, False])
@pytest.mark.usefixtures("collector")
def test_the_collector_is_afterwards_what_it_was(is_enabled: bool) -> None:
    (gc.enable if is_enabled else gc.disable)()
    with pytest.raises(RuntimeError, match="a step"), without_collector():
        assert not gc.isenabled()
        raise RuntimeError("a step")
    assert gc.isenabled() == is_enabled
