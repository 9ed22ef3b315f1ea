"""Products in 8 and 4 bits that apply an activation to their results."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpn_rt.errors import KernelArgumentError
from tests.ops.activation_reference import ACTIVATIONS, FUNCTIONS
from tests.ops.conftest import CPU_ONLY, assert_close_to_reference, poisoned, random_rows, seeded
from tests.ops.quantized_cases import QuantizedCase

DEVICES = CPU_ONLY

ROWS = [0, 1, 3, 5, 9, 12, 13, 17, 31, 32, 33, 70]
# (in_features, out_features) of a gate too: one tile or some, and columns in one part or some
SIZES = [(0, 32), (5, 32), (130, 96), (300, 160), (1100, 64)]
UNEVEN_SIZES = [(8, 0), (1, 1), (33, 31), (129, 49)]

bits = pytest.mark.parametrize("bits", [8, 4])


def check(
    generator: torch.Generator, dtype: torch.dtype, bits: int, rows: int, sizes: tuple[int, int], kind: str
) -> None:
    """Compares with the activation, in float64 and in float32, of the exact reference's sums."""
    case = QuantizedCase.of(generator, bits, sizes[1], sizes[0])
    x, bias = random_rows(generator, (rows, sizes[0]), dtype), random_rows(generator, sizes[1:], dtype)
    sums = case.reference(x, bias=bias, dtype=torch.float32)
    expected, in_float32 = (ACTIVATIONS[kind](each) for each in (sums.double(), sums))
    out = case.kernel(x, bias=bias, activation=kind, out=poisoned(tuple(expected.shape), dtype))
    assert_close_to_reference(out, expected, in_float32.to(dtype))
    assert torch.equal(case.kernel(x, bias=bias, activation=kind, out=None), out)


@bits
@pytest.mark.parametrize(("sizes", "kind"), [*product(SIZES, ACTIVATIONS), *product(UNEVEN_SIZES, FUNCTIONS)], ids=str)
def test_every_number_of_rows(
    generator: torch.Generator, dtype: torch.dtype, bits: int, sizes: tuple[int, int], kind: str
) -> None:
    for rows in ROWS:
        check(generator, dtype, bits, rows, sizes, kind)


@bits
@pytest.mark.parametrize(("kind", "columns"), [("silu_mul", 2048), ("silu_mul", 2080), ("gelu", 1024)])
def test_many_results(generator: torch.Generator, dtype: torch.dtype, bits: int, kind: str, columns: int) -> None:
    """Of two chunks of rows; they go past the caches where tiles give whole lines of them."""
    check(generator, dtype, bits, 1000, (900, columns), kind)


@bits
@pytest.mark.parametrize("kind", [None, "quick_gelu", "silu_mul"])
def test_results_between_lines_of_the_cache(
    generator: torch.Generator, dtype: torch.dtype, bits: int, kind: str | None
) -> None:
    case, x = QuantizedCase.of(generator, bits, 2048, 64), random_rows(generator, (600, 64), dtype)
    aligned = case.kernel(x, activation=kind)
    memory = poisoned((aligned.numel() + 1,), dtype)
    out = case.kernel(x, activation=kind, out=memory[1:].view_as(aligned))
    assert torch.equal(out, aligned)
    assert memory[0].isnan()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([8, 4]),
    rows=st.integers(1, 70),
    in_features=st.integers(1, 300),
    panels=st.integers(1, 5),
    kind=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_row_does_not_depend_on_its_batch(
    seed: int, bits: int, rows: int, in_features: int, panels: int, kind: str, dtype: torch.dtype
) -> None:
    generator = seeded(seed)
    case = QuantizedCase.of(generator, bits, 32 * panels, in_features)
    x = random_rows(generator, (rows, in_features), dtype)
    together = case.kernel(x, activation=kind)
    assert torch.equal(together, torch.cat([case.kernel(row[None], activation=kind) for row in x]))


@bits
def test_what_is_not_finite_stays_in_its_row(generator: torch.Generator, dtype: torch.dtype, bits: int) -> None:
    case, x = QuantizedCase.of(generator, bits, 64, 40), random_rows(generator, (20, 40), dtype)
    for kind in ACTIVATIONS:
        expected = case.kernel(x, activation=kind)
        bad = x.clone()
        bad[7, 3] = torch.nan
        out = case.kernel(bad, activation=kind)
        assert out[7].isnan().all()
        others = [i for i in range(20) if i != 7]
        assert torch.equal(out[others], expected[others])


@bits
def test_bad_activations_are_refused_by_name(generator: torch.Generator, bits: int) -> None:
    name, x = f"linear_int{bits}", torch.zeros(2, 8)
    case, uneven = (QuantizedCase.of(generator, bits, count, 8) for count in (64, 48))

    def refused(case: QuantizedCase, message: str, kind: str, out: Tensor) -> None:
        with pytest.raises(KernelArgumentError, match=f"^{name}: {message}"):
            case.kernel(x, activation=kind, out=out)

    refused(case, "activation is 'relu', expected 'silu_mul', 'quick_gelu', 'gelu'", "relu", torch.zeros(2, 64))
    wrong = {8: r"out has shape \[2, 64\], expected \[num_tokens=2, out_features / 2=32\]", 4: "weight has shape"}
    refused(case, wrong[bits], "silu_mul", torch.zeros(2, 64))
    wrong = {8: "out_features is 48, expected a multiple of 32", 4: "out has 24 columns, expected a multiple of 16"}
    refused(uneven, f"{wrong[bits]} with silu_mul", "silu_mul", torch.zeros(2, 24))
