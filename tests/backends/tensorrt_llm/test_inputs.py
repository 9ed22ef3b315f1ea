"""Inputs of a stage's engine over a scripted run: two prompts, then two tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dpn_rt.backends.tensorrt_llm.inputs import (
    SessionStage,
    context_inputs,
    generation_inputs,
    new_caches,
    output_names,
)
from dpn_rt.backends.tensorrt_llm.session import StageSession
from dpn_rt.errors import PlanError

FIRST = SessionStage(num_layers=2, hidden_size=8, num_kv_heads=2, head_dim=4, max_rows=32, is_last=False)
LAST = SessionStage(num_layers=3, hidden_size=8, num_kv_heads=2, head_dim=4, max_rows=16, is_last=True)
# Rows of the two sequences in each stage: the boundary removes 12 of the first sequence's and none of the second's.
LENGTHS = {FIRST: [20, 7], LAST: [8, 7]}
CPU = torch.device("cpu")


def ints(tensor: torch.Tensor) -> list[int]:
    return [int(value) for value in tensor]


@pytest.mark.parametrize("stage", [FIRST, LAST], ids=["first", "last"])
def test_context_then_generation(stage: SessionStage) -> None:
    lengths = LENGTHS[stage]
    caches = new_caches(stage, 2, torch.float16, CPU)
    assert [tuple(cache.shape) for cache in caches] == [(2, 2, 2, stage.max_rows, 4)] * stage.num_layers
    hidden = torch.randn(sum(lengths), 8)
    context = context_inputs(stage, hidden, lengths, caches)
    assert context["hidden_states_input"] is hidden
    assert ints(context["context_lengths"]) == ints(context["host_context_lengths"]) == lengths
    assert ints(context["host_request_types"]) == [0, 0]
    assert ints(context["sequence_length"]) == lengths
    assert ints(context["host_past_key_value_lengths"]) == [0, 0]
    for step in range(2):
        past = [length + step for length in lengths]
        generation = generation_inputs(stage, torch.randn(2, 8), lengths, past, caches)
        assert ints(generation["context_lengths"]) == ints(generation["host_context_lengths"]) == lengths
        assert ints(generation["host_request_types"]) == [1, 1]
        assert ints(generation["sequence_length"]) == [length + step + 1 for length in lengths]
        assert ints(generation["host_past_key_value_lengths"]) == past
        check_common(stage, generation, caches)
        if stage.is_last:
            assert ints(generation["last_token_ids"]) == [1, 2]
    check_common(stage, context, caches)
    if stage.is_last:
        assert ints(context["last_token_ids"]) == [8, 15]


def check_common(stage: SessionStage, inputs: dict[str, torch.Tensor], caches: list[torch.Tensor]) -> None:
    """Checks what is the same in both phases: names, dtypes and constant values."""
    names = {
        "hidden_states_input",
        "context_lengths",
        "host_context_lengths",
        "host_request_types",
        "sequence_length",
        "host_past_key_value_lengths",
        "cache_indirection",
        "host_max_attention_window_sizes",
        "host_sink_token_length",
        "host_runtime_perf_knobs",
        "host_context_progress",
        *(f"past_key_value_{layer}" for layer in range(stage.num_layers)),
        *(["last_token_ids"] if stage.is_last else []),
    }
    assert set(inputs) == names
    assert tuple(inputs["cache_indirection"].shape) == (2, 1, stage.max_rows)
    assert not inputs["cache_indirection"].any()
    assert ints(inputs["host_max_attention_window_sizes"]) == [stage.max_rows] * stage.num_layers
    assert ints(inputs["host_sink_token_length"]) == [0]
    assert (inputs["host_runtime_perf_knobs"].dtype, inputs["host_runtime_perf_knobs"].shape) == (torch.int64, (16,))
    assert (inputs["host_context_progress"].dtype, inputs["host_context_progress"].shape) == (torch.int64, (1,))
    wide = {"host_runtime_perf_knobs", "host_context_progress", "hidden_states_input"}
    for name, tensor in inputs.items():
        if name not in wide and not name.startswith("past_key_value"):
            assert tensor.dtype == torch.int32, name
    for layer, cache in enumerate(caches):
        assert inputs[f"past_key_value_{layer}"] is cache


def test_rows_that_do_not_fit() -> None:
    caches = new_caches(LAST, 1, torch.float16, CPU)
    with pytest.raises(ValueError, match="17 rows, expected at most 16"):
        context_inputs(LAST, torch.zeros(17, 8), [17], caches)
    with pytest.raises(ValueError, match="3 rows, expected 4"):
        context_inputs(LAST, torch.zeros(3, 8), [4], caches)


class PlayedSession:
    """A fake session that records its calls, with fakes of `TensorInfo` and of the lookup of dtypes."""

    def __init__(self, accepts: bool = True) -> None:
        self.accepts = accepts
        self.calls: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def infer_shapes(self, inputs: list[Any]) -> list[Any]:
        rows = next(each.shape for each in inputs if each.name == "hidden_states_input")
        return [TensorInfo("hidden_states_output", None, rows), TensorInfo("logits", None, (2, 11))]

    def run(self, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], stream: int) -> bool:
        self.calls.append((inputs, outputs))
        return self.accepts


class TensorInfo:
    def __init__(self, name: str, dtype: object, shape: tuple[int, ...]) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape


class PlayedSurface:
    TensorInfo = TensorInfo
    torch_dtype_to_trt = staticmethod(str)

    def __init__(self, session: PlayedSession) -> None:
        self.Session = self  # its `from_serialized_engine` returns the session
        self._session = session

    def from_serialized_engine(self, data: bytes) -> PlayedSession:
        assert data == b"engine"
        return self._session


@pytest.mark.parametrize("stage", [FIRST, LAST], ids=["first", "last"])
def test_a_session_counts_the_rows_of_its_stage(stage: SessionStage, tmp_path: Path) -> None:
    (tmp_path / "rank0.engine").write_bytes(b"engine")
    session = PlayedSession()
    runner = StageSession(tmp_path, stage, 2, torch.float16, PlayedSurface(session))  # type: ignore[arg-type]
    lengths = LENGTHS[stage]
    runner.context(torch.zeros(sum(lengths), 8), lengths)
    for _ in range(2):
        out = runner.generate(torch.zeros(2, 8))
        assert tuple(out.shape) == ((2, 11) if stage.is_last else (2, 8))
    assert [ints(inputs["sequence_length"]) for inputs, _ in session.calls] == [
        lengths,
        [length + 1 for length in lengths],
        [length + 2 for length in lengths],
    ]
    for inputs, outputs in session.calls:
        assert set(outputs) == set(output_names(stage))
        for layer in range(stage.num_layers):
            assert outputs[f"present_key_value_{layer}"] is inputs[f"past_key_value_{layer}"]


def test_what_a_session_cannot_do(tmp_path: Path) -> None:
    surface = PlayedSurface(PlayedSession(accepts=False))
    with pytest.raises(PlanError, match=r"rank0\.engine: .*: build the stage first"):
        StageSession(tmp_path, LAST, 2, torch.float16, surface)  # type: ignore[arg-type]
    (tmp_path / "rank0.engine").write_bytes(b"engine")
    runner = StageSession(tmp_path, LAST, 2, torch.float16, surface)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"refused the inputs .*'hidden_states_input': \[15, 8\]"):
        runner.context(torch.zeros(15, 8), LENGTHS[LAST])
