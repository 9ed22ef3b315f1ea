"""A linear layer gives the same whichever multiplication it picks, and asks torch for few different sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpn_rt import ops
from dpn_rt.model.linear import SIZES_PER_OCTAVE, Linear, can_prepack, few_sizes
from tests.skips import NO_ONEDNN


@given(st.integers(1, 1 << 20))
def test_little_is_added(rows: int) -> None:
    assert rows <= few_sizes(rows) <= rows * (1 + 1 / SIZES_PER_OCTAVE)
    assert few_sizes(few_sizes(rows)) == few_sizes(rows)


def test_sizes_are_few() -> None:
    assert len({few_sizes(rows) for rows in range(1024, 2049)}) == SIZES_PER_OCTAVE + 1


@pytest.mark.parametrize(
    ("dtype", "prepack"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str
)
@pytest.mark.parametrize("rows", [0, 1, ops.MOST_STREAMED_ROWS, ops.MOST_STREAMED_ROWS + 1, 64, 65, 131])
def test_rows_are_what_they_are_alone(rows: int, dtype: torch.dtype, prepack: bool) -> None:
    if prepack and not can_prepack(dtype):
        pytest.skip(NO_ONEDNN)
    x, weight, bias = torch.randn(rows, 48), torch.randn(40, 48), torch.randn(40)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    result = Linear(weight, bias, prepack=prepack)(x)
    expected = x.double() @ weight.double().t() + bias.double()
    assert result.shape == (rows, 40) and result.is_contiguous() and result.dtype == dtype
    tolerance = {torch.bfloat16: 2**-8, torch.float32: 1e-6}[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance * 20)
