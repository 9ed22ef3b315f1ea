from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from tests.cuda.emulated import Kernels

LARGEST = 2**31 - 1


@given(st.integers(0, LARGEST), st.integers(1, LARGEST))
@example(LARGEST, 1)
@example(LARGEST, LARGEST)
@example(LARGEST - 1, LARGEST)
@example(LARGEST, 2)
@example(2**30, 2**30)
@example(2**30 - 1, 2**30)
@example(2**30, 2**30 + 1)
def test_any_quotient(kernels: Kernels, number: int, divisor: int) -> None:
    assert kernels.number("divide", number, divisor) == number // divisor


@given(st.integers(1, 2**20), st.integers(1, 2**11 - 1))
def test_around_multiples(kernels: Kernels, divisor: int, times: int) -> None:
    for number in (divisor * times - 1, divisor * times, divisor * times + 1):
        assert kernels.number("divide", number, divisor) == number // divisor
