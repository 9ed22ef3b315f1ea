"""Arguments of kernels: each call gives a result or an error of our own, and touches no memory but its tensors'.

`make sanitize` runs it with kernels that report every access out of bounds.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from dpn_rt.errors import KernelArgumentError
from dpn_rt.ops.recording import Recording
from tests.fuzz.harness import Surface, assert_own_words, fuzz
from tests.fuzz.json_mutations import encode, mutate_value
from tests.fuzz.kernel_calls import CALLS, OPS, NotACallError, arguments_of, in_dtype

SMALL = [-1, 0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 24, 64, 127, 255, 2**15, 2**31 - 1, -(2**31)]
DTYPES = ["float32", "bfloat16", "float16", "int32", "int64", "float64", "uint8", "bool", "complex64"]


def seeds() -> list[bytes]:
    calls = [[name, in_dtype(arguments, dtype)] for name, arguments in CALLS for dtype in ("float32", "bfloat16")]
    return [encode(call) for call in calls]


def test_every_seed_is_a_call_that_some_dtype_takes() -> None:
    assert set(OPS) == {name for name, _ in CALLS}
    for name, arguments in CALLS:
        OPS[name](**arguments_of(arguments))


def test_every_op_is_recorded_or_refused() -> None:
    """An op that is bound without recording would be missing from every replay."""
    for name, arguments in CALLS:
        given = arguments_of(arguments)
        with Recording() as recording:
            try:
                OPS[name](**given)
            except RuntimeError as error:
                assert "reads values: it cannot be recorded" in str(error)
            else:
                assert len(recording) == 1, name


def test_every_call_is_a_result_or_an_error() -> None:
    fuzz(Surface("kernels", seeds(), mutate, check))


def check(data: bytes) -> None:
    try:
        name, described = json.loads(data)
        op, arguments = OPS[name], arguments_of(described)
    except (ValueError, TypeError, KeyError, RecursionError, NotACallError):
        return
    try:
        op(**arguments)
    except KernelArgumentError as error:
        assert_own_words(str(error))
        assert str(error).startswith(name.partition("[")[0]), error
    except (TypeError, ValueError) as error:
        # Of Python's own: an argument is missing, or a number has another type than the signature's.
        assert is_of_python(error), error


def is_of_python(error: Exception) -> bool:
    text = str(error)
    return any(
        words in text
        for words in (
            "argument",
            "is unknown, expected one of",
            "expected at most 8",
            "attribute",
            "expected a torch.Tensor",
        )
    )


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Numbers and dtypes of tensors most often; now and then the whole structure."""
    try:
        call = json.loads(data)
        tensors = _tensors(call)
        if not tensors or rng.random() < 0.2:
            return encode(mutate_value(call, rng))
        change_tensor(rng.choice(tensors), rng)
        return encode(call)
    except (
        ValueError,
        TypeError,
        KeyError,
        RecursionError,
    ):  # an earlier change has left nothing that these can change
        return data


def change_tensor(tensor: dict[str, Any], rng: random.Random) -> None:
    kind = rng.choice(("values", "values", "shape", "shape", "strides", "dtype", "drop"))
    if kind == "values" and tensor.get("values"):
        place = rng.randrange(len(tensor["values"]))
        old = tensor["values"][place]
        tensor["values"][place] = rng.choice((*SMALL, old + 1, old - 1, old * 2))
    elif kind == "shape" and tensor.get("shape"):
        place = rng.randrange(len(tensor["shape"]))
        tensor["shape"][place] = max(0, rng.choice((*SMALL, tensor["shape"][place] + 1, tensor["shape"][place] - 1)))
    elif kind == "strides" and isinstance(tensor.get("shape"), list):
        tensor["strides"] = [max(0, rng.choice(SMALL)) for _ in tensor["shape"][:-1]] + [1] * bool(tensor["shape"])
    elif kind == "drop" and len(tensor.get("shape") or ()) > 1:
        del tensor["shape"][rng.randrange(len(tensor["shape"]))]
    else:
        tensor["dtype"] = rng.choice(DTYPES)


def _tensors(value: object) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [tensor for item in value for tensor in _tensors(item)]
    if not isinstance(value, dict):
        return []
    is_tensor = isinstance(value.get("shape"), list)
    return [value] if is_tensor else [tensor for item in value.values() for tensor in _tensors(item)]


def test_the_check_finds_what_a_kernel_should_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("vector::_M_default_append")

    monkeypatch.setitem(OPS, "linear", broken)
    with pytest.raises(RuntimeError):
        check(encode(["linear", {}]))
