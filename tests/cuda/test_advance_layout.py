"""The next layout from the device against what the host computes (dpn_rt/layout.py, dpn_rt/pyramid.py)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dpn_rt.layout import Layout
from tests.cuda.conftest import Guards, int32
from tests.cuda.emulated import Kernels

KERNELS = np.array([[1, 1], [1, 2], [2, 2], [4, 1]], dtype=np.int32)
MIN_VISUAL_TOKENS = 16


@dataclass
class Prompt:
    num_rows: int
    image_start: int | None
    grid: tuple[int, int] | None
    router_rows: np.ndarray


def random_prompt(random: np.random.Generator) -> Prompt:
    before, after = int(random.integers(4, 8)), int(random.integers(1, 6))
    if random.random() < 0.2:
        return Prompt(before + after, None, None, np.zeros(0, dtype=np.int32))
    grid = int(random.integers(1, 8)), int(random.integers(1, 8))
    rows = before + grid[0] * grid[1] + after
    routers = np.sort(random.integers(rows - after, rows, int(random.integers(1, 3)))).astype(np.int32)
    return Prompt(rows, before, grid, routers)


@pytest.mark.parametrize("num_seqs", [1, 5, 32, 33, 70])
@pytest.mark.parametrize("mode", ["router", "forced", "static"])
def test_advance_layout(kernels: Kernels, guards: Guards, num_seqs: int, mode: str) -> None:
    random = np.random.default_rng()
    prompts = [random_prompt(random) for _ in range(num_seqs)]
    layout = Layout.of_prompts(prompts, random.integers(0, 4, num_seqs).tolist())
    probs = random.random((num_seqs, len(KERNELS))).astype(np.float32)
    routed = probs.argmax(1).astype(np.int32)
    forced = random.integers(-1, len(KERNELS), num_seqs).astype(np.int32)

    # As Boundary.apply does it.
    if mode == "static":
        chosen, scales = np.zeros_like(routed), np.ones(num_seqs, dtype=np.float32)
    else:
        chosen = routed if mode == "router" else np.where(forced < 0, routed, forced)
        scales = np.take_along_axis(probs, chosen[:, None], 1)[:, 0]
    skipped = layout.num_visual < MIN_VISUAL_TOKENS
    pooled_grids = layout.grids // KERNELS[chosen]
    untouched = skipped | (pooled_grids.min(1) == 0)
    pooled = layout.pooled(np.where(untouched[:, None], layout.grids, pooled_grids).astype(np.int32))

    put = guards.put
    num_rows = int(layout.cu_seqlens[-1])
    outputs = {
        "chosen": guards.poisoned(num_seqs, dtype=torch.int32),
        "experts": guards.poisoned(num_seqs, dtype=torch.int32),
        "scales": guards.poisoned(num_seqs, dtype=torch.float32),
        "cu_seqlens": guards.poisoned(num_seqs + 1, dtype=torch.int32),
        "grids": guards.poisoned(num_seqs, 2, dtype=torch.int32),
        "router_rows": guards.poisoned(len(layout.router_rows), dtype=torch.int32),
        "positions": guards.poisoned(num_rows, dtype=torch.int32),
    }
    kernels.advance_layout(
        *outputs.values(), put(int32(routed)) if mode != "static" else None,
        put(torch.from_numpy(probs)) if mode != "static" else None, put(int32(forced)) if mode == "forced" else None,
        put(int32(KERNELS)), MIN_VISUAL_TOKENS, put(int32(layout.cu_seqlens)), put(int32(layout.first_rows)),
        put(int32(layout.image_start)), put(int32(layout.grids)), put(int32(layout.packed_router_rows)),
        put(int32(layout.cu_router_rows)),
    )  # fmt: skip
    expected = {
        "chosen": np.where(skipped, -1, chosen),
        "experts": np.where(untouched, -1, chosen),
        "cu_seqlens": pooled.cu_seqlens,
        "grids": pooled.grids,
        "router_rows": pooled.packed_router_rows,
        "positions": np.pad(pooled.positions, (0, num_rows - len(pooled.positions))),
    }
    for name, value in expected.items():
        assert np.array_equal(outputs[name].numpy(), value), name
    assert np.array_equal(outputs["scales"].numpy()[~skipped], scales[~skipped])
