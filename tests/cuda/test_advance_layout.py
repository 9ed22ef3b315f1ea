"""The next layout against a reference that follows every row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.cuda.conftest import Guards, int32
from tests.cuda.emulated import Kernels
from tests.ops.advance_layout_cases import KERNELS, MIN_VISUAL_TOKENS, MODES, random_case


@pytest.mark.parametrize("num_seqs", [1, 5, 32, 33, 70])
@pytest.mark.parametrize("max_images", [0, 1, 5])
@pytest.mark.parametrize("mode", MODES)
def test_advance_layout(kernels: Kernels, guards: Guards, num_seqs: int, max_images: int, mode: str) -> None:
    case = random_case(np.random.default_rng(torch.initial_seed()), num_seqs, mode, max_images)
    put = guards.put
    layout = {name: put(int32(value.tolist()).reshape(value.shape)) for name, value in case.layout().items()}
    expected = case.expected()
    outputs = {
        name: guards.poisoned(*value.shape, dtype=torch.float32 if name == "scales" else torch.int32)
        for name, value in expected.items()
    }
    kernels.advance_layout(
        *outputs.values(), None if case.routed is None else put(int32(case.routed)),
        None if case.probs is None else put(torch.from_numpy(case.probs)),
        None if case.forced is None else put(int32(case.forced)),
        put(int32(KERNELS)), MIN_VISUAL_TOKENS, layout["cu_seqlens"], layout["first_positions"],
        layout["first_cache_rows"], layout["cu_images"], layout["image_starts"], layout["grids"],
        layout["router_rows"], layout["cu_router_rows"],
    )  # fmt: skip
    for name, value in expected.items():
        assert np.array_equal(outputs[name].numpy(), value), name
