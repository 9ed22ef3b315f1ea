"""The next layout from the device against what the host computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.cuda.conftest import Guards, int32
from tests.cuda.emulated import Kernels
from tests.ops.advance_layout_cases import KERNELS, MIN_VISUAL_TOKENS, MODES, random_case


@pytest.mark.parametrize("num_seqs", [1, 5, 32, 33, 70])
@pytest.mark.parametrize("mode", MODES)
def test_advance_layout(kernels: Kernels, guards: Guards, num_seqs: int, mode: str) -> None:
    case = random_case(np.random.default_rng(), num_seqs, mode)
    layout, put = case.layout, guards.put
    expected = case.expected()
    outputs = {
        name: guards.poisoned(*value.shape, dtype=torch.float32 if name == "scales" else torch.int32)
        for name, value in expected.items()
    }
    kernels.advance_layout(
        *outputs.values(), None if case.routed is None else put(int32(case.routed)),
        None if case.probs is None else put(torch.from_numpy(case.probs)),
        None if case.forced is None else put(int32(case.forced)),
        put(int32(KERNELS)), MIN_VISUAL_TOKENS, put(int32(layout.cu_seqlens)), put(int32(case.first_positions)),
        put(int32(layout.first_rows)), put(int32(layout.image_start)), put(int32(layout.grids)),
        put(int32(layout.router_rows_from(layout.cu_seqlens))), put(int32(layout.cu_router_rows)),
    )  # fmt: skip
    for name, value in expected.items():
        assert np.array_equal(outputs[name].numpy(), value), name
