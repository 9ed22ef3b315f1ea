"""The trained checkpoint of the repository gives right answers, and runtime and eager model give the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dpn_rt import LLM
from dpn_rt.builders.native import build_engine
from examples import demo
from examples.tiny_dpn.agreement import compare_with_eager
from examples.tiny_dpn.answers import Answer, ask_runtime
from examples.tiny_dpn.data import Sample, sample
from examples.tiny_dpn.metrics import summarize

NUM_SCENES = 20
ACCURACY_FLOOR = 0.88
"""Three points below the accuracy that was measured on these 200 questions."""
DENSE_FLOOR = 0.95
"""The same for the dense twin, on 50 of these questions."""
NEAR_TIE = 1e-3
"""Margin between two logits that rounding in float32 can reverse."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(demo.CHECKPOINT, tmp_path_factory.mktemp("tiny") / "engine", dtype="float32").path


@pytest.fixture(scope="module")
def llm(engine: Path) -> LLM:
    return LLM(engine)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [sample("test", index) for index in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def answers(llm: LLM, samples: Sequence[Sample]) -> list[Answer]:
    return ask_runtime(llm, samples, "held-out questions")


def test_held_out_questions_are_answered_right(answers: list[Answer]) -> None:
    assert len(answers) == 200
    assert summarize(answers).overall.accuracy >= ACCURACY_FLOOR


def test_fine_questions_keep_more_visual_tokens(answers: list[Answer]) -> None:
    assert summarize(answers).fine_to_coarse >= 1.5


def test_runtime_and_eager_give_the_same_answers(
    llm: LLM, engine: Path, samples: Sequence[Sample], answers: list[Answer]
) -> None:
    differ = compare_with_eager(llm, engine, samples, answers, "eager")
    assert all(item.eager_margin < NEAR_TIE for item in differ), differ


def test_the_dense_twin_answers_too_and_pools_nothing(samples: Sequence[Sample], tmp_path: Path) -> None:
    twin = demo.CHECKPOINT.with_name("dense_checkpoint")
    llm = LLM(build_engine(twin, tmp_path / "engine", dtype="float32").path)
    group = summarize(ask_runtime(llm, samples[:5], "the dense twin")).overall
    assert group.accuracy >= DENSE_FLOOR
    assert group.visual_tokens == (256,) and group.flops_ratio == 1


def test_demo_prints_every_question(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main() == 0
    printed = capsys.readouterr().out
    for asked in demo.QUESTIONS:
        assert asked.question in printed
    assert f"of {len(demo.QUESTIONS)} right" in printed
