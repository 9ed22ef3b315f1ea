"""Sampling parameters: defaults, normalised values, and every error."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from dpn_rt.errors import RequestError
from dpn_rt.sampling.params import SamplingParams


def test_defaults() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.max_tokens) == (1, 1.0, 1.0, 16)
    assert params.stop_strings == params.stop_ids == ()
    assert not params.is_greedy and not params.has_penalties
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [("stop", ["a" * 5000, ""]), ("stop_token_ids", [-1] * 5000), ("temperature", "b" * 5000), ("seed", 10**4000)],
)
def test_messages_do_not_repeat_long_values(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name}=") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 400


def test_values_are_normalised() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[np.int64(3)], temperature=0, top_k=np.int32(5), seed=-1)
    assert params.stop_strings == ("END",)
    assert params.stop_ids == (3,)
    assert params.seed is None and params.is_greedy
    assert SamplingParams(top_k=-1).top_k == -1
    assert hash(params) == hash(dataclasses.replace(params))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"n": 0}, "n=0: expected 1 to 16384"),
        ({"n": 16385}, "n=16385: expected 1 to 16384"),
        ({"n": 10**30}, "n=10000"),
        ({"n": True}, "n=True: expected an integer"),
        ({"n": 2.0}, "n=2.0: expected an integer"),
        ({"n": 2, "temperature": 0}, "n=2 with temperature=0.0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan: expected a finite"),
        ({"temperature": "warm"}, "temperature='warm': expected a number"),
        ({"temperature": False}, "temperature=False"),
        ({"top_p": 0}, "top_p=0.0: expected above 0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_k": -2}, "top_k=-2"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty=0.0"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty=1e-46: expected from 1e-6 to 1e6"),
        ({"temperature": 1e39}, "temperature=1e+39: expected from 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5: expected from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty=-3.0"),
        ({"seed": 2**63}, "seed="),
        ({"seed": "1"}, "seed='1'"),
        ({"stop": ""}, "stop="),
        ({"stop": ["a", 1]}, "stop="),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": "12"}, "stop_token_ids"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids=1.5"),
        ({"max_tokens": 0}, "max_tokens=0: expected at least 1, or None"),
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is above max_tokens=4"),
        ({"logprobs": -2}, "logprobs=-2"),
        ({"logprobs": True}, "logprobs=True"),
        ({"ignore_eos": 1}, "ignore_eos=1: expected True or False"),
        ({"skip_special_tokens": None}, "skip_special_tokens=None"),
    ],
)
def test_refusals_name_field_and_value(values: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**values)
    assert named in str(caught.value)
