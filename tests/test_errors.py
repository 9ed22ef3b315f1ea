"""Messages of errors: of a bounded length, whatever the values in them are."""

from __future__ import annotations

import pickle

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dpn_rt import errors
from dpn_rt.errors import MAX_MESSAGE, BatchError, DpnError, EngineError, RequestError

PLAIN = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, DpnError)]
PLAIN.remove(BatchError)


@pytest.mark.parametrize("error", PLAIN, ids=lambda error: error.__name__)
@pytest.mark.parametrize("length", [0, 1, MAX_MESSAGE])
def test_a_message_that_is_not_too_long_is_kept(error: type[DpnError], length: int) -> None:
    assert str(error("e" * length)) == "e" * length


@pytest.mark.parametrize("error", PLAIN, ids=lambda error: error.__name__)
@given(length=st.integers(MAX_MESSAGE + 1, 10 * MAX_MESSAGE))
def test_a_long_message_keeps_its_start_and_its_end(error: type[DpnError], length: int) -> None:
    raised = error("model.layers: " + "9" * length + ": expected 3")
    assert len(str(raised)) <= MAX_MESSAGE
    assert str(raised).startswith("model.layers: 999") and str(raised).endswith("999: expected 3")
    assert " ... " in str(raised)
    assert str(pickle.loads(pickle.dumps(raised))) == str(raised)


def test_a_list_with_many_failures_has_a_short_message_and_every_error() -> None:
    failures: dict[int, DpnError] = {at: RequestError(f"prompt {at} has no text") for at in range(5000)}
    raised = pickle.loads(pickle.dumps(BatchError(failures, [None] * 5001)))
    assert len(str(raised)) <= MAX_MESSAGE
    assert str(raised).startswith("5000 of 5001 prompts failed")
    assert {at: str(error) for at, error in raised.errors.items()} == {at: str(e) for at, e in failures.items()}
    assert raised.outputs == [None] * 5001


def test_an_error_may_have_no_message() -> None:
    assert str(EngineError()) == ""
