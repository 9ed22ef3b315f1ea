"""Deliberate mistakes must show in the evaluated networks: each changes log-probabilities far more than allowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpn_rt import ops
from dpn_rt.backends.tensorrt.stage import PlanStage
from dpn_rt.builders.tensorrt.layers import Graph
from tests.backends.tensorrt.engines import evaluated_llm, logprob_error, write_plan_engine
from tests.golden_answers import PARAMS
from tests.golden_cases import case_named
from tests.skips import NO_TENSORRT

pytest.importorskip("tensorrt_rtx_bindings", reason=NO_TENSORRT)

TOLERANCE = 1e-3
CASE = case_named("c12_g5_r002")
"""Takes the 1x1 expert twice and pools at the end."""
Weights = dict[str, torch.Tensor]
Mutation = Callable[[pytest.MonkeyPatch, Weights], None]


def nothing(patch: pytest.MonkeyPatch, weights: Weights) -> None:
    """Changes nothing."""


def interleaved_rotary(patch: pytest.MonkeyPatch, weights: Weights) -> None:
    def rotate(self: Graph, heads: Any, positions: Any, cosines: Any, sines: Any) -> Any:
        layer = self.network.add_rotary_embedding(self.widen(heads), cosines, sines, True, 0)
        layer.set_input(3, positions)
        return layer.get_output(0)

    patch.setattr(Graph, "rotate", rotate)


def swapped_gate_and_up(patch: pytest.MonkeyPatch, weights: Weights) -> None:
    for name in [name for name in weights if name.endswith("gate_up.weight")]:
        weights[name] = torch.cat(weights[name].chunk(2)[::-1])


def swapped_keys_and_values(patch: pytest.MonkeyPatch, weights: Weights) -> None:
    for name in [name for name in weights if name.endswith("qkv.weight")]:
        q, k, v = weights[name].chunk(3)
        weights[name] = torch.cat((q, v, k))


def change_run(patch: pytest.MonkeyPatch, position: int, phase: str, step: int) -> None:
    """Adds `step` to one of the arrays of rows that go into the plans of one phase."""
    run = PlanStage._run

    def changed(self: PlanStage, loaded: Any, *arguments: Any) -> torch.Tensor:
        values = list(arguments)
        if loaded.spec.phase == phase:
            values[position] = values[position] + step
        return run(self, loaded, *values)

    patch.setattr(PlanStage, "_run", changed)


def position_one_too_high(patch: pytest.MonkeyPatch, weights: Weights) -> None:
    change_run(patch, 1, "decode", 1)


def row_written_one_too_late(patch: pytest.MonkeyPatch, weights: Weights) -> None:
    change_run(patch, 2, "decode", 1)


def length_one_too_short(patch: pytest.MonkeyPatch, weights: Weights) -> None:
    change_run(patch, 3, "decode", -1)


def length_one_too_long(patch: pytest.MonkeyPatch, weights: Weights) -> None:
    change_run(patch, 3, "decode", 1)


def prefill_one_too_short(patch: pytest.MonkeyPatch, weights: Weights) -> None:
    change_run(patch, 3, "prefill", -1)


def unscaled_1x1(patch: pytest.MonkeyPatch, weights: Weights) -> None:
    pool = ops.pool

    def changed(x: Any, *layout: Any, scales: Any, **options: Any) -> Any:
        experts = layout[4]
        return pool(x, *layout, scales=torch.where(experts == 0, 1.0, scales), **options)

    patch.setattr(ops, "pool", changed)


def not_causal(patch: pytest.MonkeyPatch, weights: Weights) -> None:
    attend = Graph.attend
    patch.setattr(Graph, "attend", lambda self, *arguments, causal: attend(self, *arguments, causal=False))


def error(mutation: Mutation, directory: Path, patch: pytest.MonkeyPatch) -> float:
    weights = CASE.canonical_weights()
    mutation(patch, weights)
    llm = evaluated_llm(write_plan_engine(directory / "engine", CASE.config, weights), patch)
    return logprob_error(llm.generate(CASE.request(), PARAMS, use_tqdm=False)[0], CASE.logprobs)


def test_without_a_mistake_nothing_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(nothing, tmp_path, monkeypatch) < TOLERANCE


@pytest.mark.parametrize(
    "mutation",
    [
        interleaved_rotary,
        swapped_gate_and_up,
        swapped_keys_and_values,
        position_one_too_high,
        row_written_one_too_late,
        length_one_too_short,
        length_one_too_long,
        prefill_one_too_short,
        unscaled_1x1,
        not_causal,
    ],
)
def test_a_mistake_shows(mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(mutation, tmp_path, monkeypatch) > 10 * TOLERANCE
