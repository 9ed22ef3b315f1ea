"""Arguments that the Python functions refuse before a kernel or torch runs."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from dpn_rt.tuning.cpu_choices import default_choices
from tests.fuzz.kernel_calls import CALLS, arguments_of
from tests.ops.conftest import CPU_ONLY

DEVICES = CPU_ONLY
MOST = default_choices().most_streamed_rows


def test_linear_never_resizes_its_output() -> None:
    x, weight, out = torch.zeros(MOST + 1, 8), torch.zeros(4, 8), torch.zeros(2, 4)
    with pytest.raises(KernelArgumentError, match=r"out has shape \[2, 4\]"):
        ops.linear(x, weight, out=out)
    assert out.shape == (2, 4)


def test_pool_allocates_no_more_rows_than_it_was_given() -> None:
    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    with pytest.raises(KernelArgumentError, match="ends at 2147483647, expected at most num_tokens=4"):
        ops.pool(
            torch.zeros(4, 8),
            ints(0, 4),
            ints(0, 0),
            ints(),
            torch.zeros(0, 2, dtype=torch.int32),
            ints(),
            ints(1, 1)[None],
            ints(0, 2**31 - 1),
        )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (None, "rms_norm: x is of type NoneType, expected a tensor"),
        ([[1.0]], "rms_norm: x is of type float, expected a tensor"),
        ([], "rms_norm: x is of type list, expected a tensor"),
        ([torch.zeros(2, 8)], "rms_norm: x is of type list, expected a tensor"),
        (np.zeros((2, 8), dtype=np.float32), "rms_norm: x is of type ndarray, expected a tensor"),
        (torch.zeros(()), "rms_norm: x"),
        (torch.zeros(2, 8).to_sparse(), "rms_norm: x has layout torch.sparse_coo, expected torch.strided"),
    ],
    ids=["none", "list", "empty", "of tensors", "numpy", "0-d", "sparse"],
)
def test_what_is_no_tensor_of_rows(argument: Any, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=re.escape(message)):
        ops.rms_norm(argument, torch.ones(8), 1e-5)


def test_what_is_no_tensor_in_a_list_of_them_or_in_a_layout() -> None:
    arguments = arguments_of(next(call for name, call in CALLS if name == "pool" and "conv_weights" in call))
    with pytest.raises(KernelArgumentError, match="pool: conv_weights is of type list, expected a tensor"):
        ops.pool(**{**arguments, "conv_weights": [[]]})
    for name, call in CALLS:
        if name == "advance_layout":
            arguments = arguments_of(call)
            layout = ops.DeviceLayout(**{**arguments.pop("layout"), "cu_seqlens": [0, 20, 25]})
            with pytest.raises(
                KernelArgumentError, match=r"advance_layout: layout\.cu_seqlens is of type int, expected a tensor"
            ):
                ops.advance_layout(layout, **arguments)


@pytest.mark.parametrize("kind", ["activation", "pool"])
def test_names_in_messages_are_cut(kind: str) -> None:
    name, call = next(item for item in CALLS if item[0] == kind)
    changed = {**arguments_of(call), {"activation": "kind", "pool": "function"}[kind]: "a" * 5000}
    with pytest.raises(KernelArgumentError, match=f"{name}: .* is 'a{{37}}\\.\\.\\.', expected '"):
        getattr(ops, name)(**changed)


def test_a_wrong_call_stays_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="missing"):
        ops.rms_norm(torch.ones(2, 8))  # type: ignore[call-arg]


ROWS = [2, MOST + 1]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_without_columns(rows: int, with_bias: bool) -> None:
    bias = torch.randn(30) if with_bias else None
    result = ops.linear(torch.randn(rows, 0), torch.randn(30, 0), bias)
    assert torch.equal(result, torch.zeros(rows, 30) if bias is None else bias.expand(rows, -1))


@pytest.mark.parametrize("rows", ROWS)
def test_linear_checks_any_number_of_rows(rows: int) -> None:
    x, weight = torch.randn(rows, 8), torch.randn(8, 8)
    memory = torch.zeros(rows + 1, 8)
    bad: list[dict[str, Any]] = [
        {"x": x, "weight": weight, "out": x},
        {"x": memory[1:], "weight": weight, "out": memory[:-1]},
        {"x": x, "weight": weight.to("meta")},
        {"x": x, "weight": weight.bfloat16()},
        {"x": x, "weight": weight.t()[:, :8]},
        {"x": x, "weight": weight[:, :7]},
        {"x": x, "weight": weight, "bias": torch.zeros(rows, 8)},
        {"x": x, "weight": weight, "bias": torch.zeros(16)[::2]},
        {"x": x, "weight": weight, "bias": torch.zeros(())},
        {"x": x, "weight": weight, "out": torch.zeros(8, rows).t()},
        {"x": x.to_sparse(), "weight": weight},
    ]
    for arguments in bad:
        with pytest.raises(KernelArgumentError, match="linear: "):
            ops.linear(**arguments)
    out = torch.empty(rows, 8)
    assert ops.linear(x, weight, out=out) is out
