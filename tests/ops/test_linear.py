from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from dpn_rt.tuning.cpu_choices import default_choices
from tests.ops.conftest import CPU_ONLY, assert_close_to_reference, poisoned, random_rows, seeded

MOST = default_choices().most_streamed_rows

DEVICES = CPU_ONLY

ROWS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 27, MOST, MOST + 1]
# (in_features, out_features): one, below and above vectors of 4 to 32 elements and groups of 3 and 4 rows, empty
SIZES = [(1, 1), (7, 3), (31, 29), (32, 4), (33, 13), (160, 100), (1000, 257), (2048, 130), (0, 4), (8, 0)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_linear(generator: torch.Generator, dtype: torch.dtype, sizes: tuple[int, int], with_bias: bool) -> None:
    weight = random_rows(generator, sizes[::-1], dtype)
    bias = random_rows(generator, sizes[1:], dtype) if with_bias else None
    for rows in ROWS:
        x = random_rows(generator, (rows, sizes[0]), dtype)
        out = ops.linear(x, weight, bias, out=poisoned((rows, sizes[1]), dtype))
        reference = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        same_precision = functional.linear(x, weight, bias)
        # Both sum in float32 in some order, so either may be more exact by chance.
        assert_close_to_reference(out, reference, same_precision, floor=1e-6 + 1e-7 * sizes[0] ** 0.5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, MOST),
    in_features=st.integers(1, 200),
    out_features=st.integers(1, 90),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_does_not_depend_on_its_batch(
    seed: int, rows: int, in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    generator = seeded(seed)
    x = random_rows(generator, (rows, in_features), dtype)
    weight = random_rows(generator, (out_features, in_features), dtype)
    together = ops.linear(x, weight)
    assert torch.equal(together, torch.cat([ops.linear(row[None], weight) for row in x]))
    order = torch.randperm(rows, generator=generator)
    assert torch.equal(ops.linear(x[order], weight), together[order])


def test_large_weight_in_parallel_equals_its_parts(generator: torch.Generator, dtype: torch.dtype) -> None:
    x, weight = random_rows(generator, (4, 600), dtype), random_rows(generator, (2000, 600), dtype)
    parts = [ops.linear(x, part) for part in weight.split(97)]
    assert torch.equal(ops.linear(x, weight), torch.cat(parts, dim=1))


def test_nan_stays_in_its_row_and_column(generator: torch.Generator, dtype: torch.dtype) -> None:
    x, weight = random_rows(generator, (min(9, MOST), 37), dtype), random_rows(generator, (11, 37), dtype)
    x[-1, 36] = float("nan")
    weight[7, 0] = float("nan")
    out = ops.linear(x, weight)
    expected = torch.zeros(len(x), 11, dtype=torch.bool)
    expected[-1], expected[:, 7] = True, True
    assert torch.equal(out.isnan(), expected)


def test_strided_rows(generator: torch.Generator, dtype: torch.dtype) -> None:
    wide, weight = random_rows(generator, (4, 90), dtype), random_rows(generator, (6, 40), dtype)
    assert torch.equal(ops.linear(wide[:, 25:65], weight), ops.linear(wide[:, 25:65].contiguous(), weight))
    assert torch.equal(ops.linear(wide[1:2, :40].expand(4, 40), weight)[3], ops.linear(wide[1:2, :40], weight)[0])


@pytest.mark.parametrize("rows", [2, MOST + 1])
def test_bad_arguments_are_refused(rows: int) -> None:
    x, weight, bias = torch.zeros(rows, 8), torch.zeros(4, 8), torch.zeros(4)
    cases = [
        lambda: ops.linear(x, weight[:, :7]),
        lambda: ops.linear(x, weight.bfloat16()),
        lambda: ops.linear(x, weight, bias[:3]),
        lambda: ops.linear(x, weight, bias.bfloat16()),
        lambda: ops.linear(x, weight, torch.zeros(2, 4)),
    ]
    for call in cases:
        with pytest.raises(KernelArgumentError, match=r"^linear: "):
            call()


def test_bad_arguments_are_refused_by_name() -> None:
    x, weight, bias = torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(4)
    cases = [
        (lambda: ops.linear(x[0], weight), r"x has shape \[8\], expected \[num_tokens, in_features\]"),
        (lambda: ops.linear(x, weight[:, :7]), r"weight has shape \[4, 7\], expected .*in_features=8"),
        (lambda: ops.linear(x, torch.zeros(4, 16)[:, :8]), "weight .* has stride 16 in dimension 0, expected 8"),
        (lambda: ops.linear(x, weight.bfloat16()), "weight has dtype bfloat16, expected float32"),
        (lambda: ops.linear(torch.zeros(2, 16)[:, ::2], weight), "x has stride 2"),
        (lambda: ops.linear(x, weight, bias[:3]), r"bias has shape \[3\], expected \[out_features=4\]"),
        (lambda: ops.linear(x, weight, bias.bfloat16()), "bias has dtype bfloat16"),
        (lambda: ops.linear(x, weight, out=torch.zeros(2, 5)), r"out has shape \[2, 5\]"),
        (lambda: ops.linear(x, weight, out=torch.zeros(2, 4).bfloat16()), "out has dtype bfloat16"),
        (lambda: ops.linear(x, weight, out=x[:, :4]), "out .* has stride 8|out shares memory with x"),
        (lambda: ops.linear(x, weight, out=weight.flatten()[:8].view(2, 4)), "out shares memory with weight"),
        (lambda: ops.linear(x, weight, bias, out=bias.expand(1, 4).expand(2, 4)), "out .* has stride"),
        (lambda: ops.linear(x, weight.to("meta")), "weight is on "),
    ]
    for call, message in cases:
        with pytest.raises(KernelArgumentError, match=message):
            call()
