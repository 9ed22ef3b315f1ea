from __future__ import annotations

import pytest
import torch

from tests.cuda.conftest import Guards
from tests.cuda.emulated import Kernels
from tests.ops.segment_cases import Image, Sample, expected_rows, new_random, ragged, row_arguments, text


def check(kernels: Kernels, guards: Guards, samples: list[Sample]) -> None:
    """With room for more rows than there are, and entries after those that are kept."""
    expected, arguments = expected_rows(samples), row_arguments(samples)
    arguments["kept"] = torch.cat([arguments["kept"], arguments["kept"].new_full((5,), 2**30)])
    out = guards.poisoned(len(expected) + 300, dtype=torch.int64)
    kernels.kept_rows(out, *(guards.put(argument) for argument in arguments.values()), -1)
    assert out[: len(expected)].tolist() == expected
    assert (out[len(expected) :] == 0).all()


def test_ragged_images(kernels: Kernels, guards: Guards) -> None:
    check(kernels, guards, ragged(new_random()))


def test_more_sequences_than_a_warp(kernels: Kernels, guards: Guards) -> None:
    check(kernels, guards, ragged(new_random())[2:8] * 9)


@pytest.mark.parametrize("samples", [[text(0)], [text(2)], [Sample((Image(0, 0, ()),), 0)]], ids=str)
def test_smallest_batches(kernels: Kernels, guards: Guards, samples: list[Sample]) -> None:
    check(kernels, guards, samples)
