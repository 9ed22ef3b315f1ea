"""What the Python faces refuse before a kernel or torch is asked."""

from __future__ import annotations

import pytest
import torch

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from tests.ops.conftest import CPU_ONLY

DEVICES = CPU_ONLY


def test_linear_never_resizes_its_output() -> None:
    x, weight, out = torch.zeros(ops.MOST_STREAMED_ROWS + 1, 8), torch.zeros(4, 8), torch.zeros(2, 4)
    with pytest.raises(KernelArgumentError, match=r"out has shape \[2, 4\]"):
        ops.linear(x, weight, out=out)
    assert out.shape == (2, 4)


def test_pool_allocates_no_more_rows_than_it_was_given() -> None:
    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    with pytest.raises(KernelArgumentError, match="ends at 2147483647, expected at most num_tokens=4"):
        ops.pool(
            torch.zeros(4, 8), ints(0, 4), ints(-1), ints(0, 0)[None], ints(-1), ints(1, 1)[None], ints(0, 2**31 - 1)
        )
