"""Outputs as rows of a table."""

from __future__ import annotations

import sys
import types

import pytest

from dpn_rt import LLM, SamplingParams
from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate import to_dataframe
from dpn_rt.evaluate.dataframe import rows_of
from dpn_rt.outputs import RequestOutput
from examples.tiny_dpn.answers import chat_messages
from examples.tiny_dpn.data import sample
from tests.skips import NO_PARQUET


@pytest.fixture(scope="module")
def outputs(llm: LLM) -> list[RequestOutput]:
    scene = sample("test", 0)
    asked = [chat_messages(scene.image, question.text) for question in scene.questions[:2]]
    return llm.chat(asked, SamplingParams(temperature=0, max_tokens=8))


def test_rows(outputs: list[RequestOutput]) -> None:
    row = rows_of(outputs)[0]
    pyramid = outputs[0].pyramid
    assert row["text"] == "blue" and row["finish_reason"] == "stop" and row["num_tokens"] == 2
    assert row["route"] == " ".join(f"{kernel[0]}x{kernel[1]}" for kernel in pyramid.kernels if kernel)
    assert row["visual_tokens"] == pyramid.visual_tokens and row["visual_tokens_last"] == pyramid.visual_tokens[-1]
    assert pyramid.flops is not None and row["flops"] == pyramid.flops.prefill and 0 < row["flops_saved"] < 1
    assert 0 < row["first_token_seconds"] <= row["total_seconds"] and row["error"] is None
    assert rows_of([None]) == [{"text": None}]


def test_it_is_pandas_that_makes_the_table(outputs: list[RequestOutput], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=lambda rows: ("frame", rows)))  # type: ignore[arg-type]
    assert to_dataframe(outputs) == ("frame", rows_of(outputs))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        EvaluationError, match=r"^to_dataframe needs the package pandas: in the repository, pip install"
    ):
        to_dataframe(outputs)


def test_a_frame_of_pandas(outputs: list[RequestOutput]) -> None:
    pytest.importorskip("pandas", reason=NO_PARQUET)
    frame = to_dataframe(outputs)
    assert list(frame["text"]) == [output.outputs[0].text.strip() for output in outputs] and len(frame) == 2
