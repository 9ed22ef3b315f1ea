from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from tests.ops.advance_layout_cases import KERNELS, MIN_VISUAL_TOKENS, MODES, Case, random_case


def int32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def device_layout(case: Case, max_tokens: int) -> ops.DeviceLayout:
    layout = case.layout
    return ops.DeviceLayout(
        cu_seqlens=int32(layout.cu_seqlens),
        first_positions=int32(case.first_positions),
        first_cache_rows=int32(layout.first_rows),
        image_start=int32(layout.image_start),
        grids=int32(layout.grids.tolist()).reshape(-1, 2),
        router_rows=int32(layout.router_rows_from(layout.cu_seqlens)),
        cu_router_rows=int32(layout.cu_router_rows),
        positions=torch.zeros(max_tokens, dtype=torch.int32),
        cache_rows=torch.zeros(max_tokens, dtype=torch.int32),
    )


def arguments(case: Case) -> dict[str, Any]:
    return {
        "layout": device_layout(case, case.num_rows),
        "kernels": int32(KERNELS),
        "min_visual_tokens": MIN_VISUAL_TOKENS,
        "routed": None if case.routed is None else int32(case.routed),
        "probs": None if case.probs is None else torch.tensor(case.probs),
        "forced": None if case.forced is None else int32(case.forced),
    }


@pytest.mark.parametrize("num_seqs", [0, 1, 5, 33, 70])
@pytest.mark.parametrize("mode", MODES)
def test_advance_layout(num_seqs: int, mode: str) -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    case = random_case(np.random.default_rng(seed), num_seqs, mode) if num_seqs else EMPTY
    advance = ops.advance_layout(**arguments(case))
    found = dataclasses.asdict(advance.layout) | {
        "chosen": advance.chosen, "experts": advance.experts, "scales": advance.scales
    }  # fmt: skip
    for name, value in case.expected().items():
        assert np.array_equal(found[name].cpu().numpy(), value), name


def test_two_boundaries_after_each_other(device: torch.device) -> None:
    """What one returns is what the next takes, rows after the last included."""
    case = random_case(np.random.default_rng(), 12, "router")
    first = ops.advance_layout(**arguments(case)).layout
    second = ops.advance_layout(first, int32(KERNELS), MIN_VISUAL_TOKENS)
    host = dataclasses.replace(
        case.layout,
        lengths=np.diff(first.cu_seqlens.cpu().numpy()),
        grids=first.grids.cpu().numpy(),
        router_rows=(first.router_rows.cpu().numpy() - np.repeat(first.cu_seqlens.cpu().numpy()[:-1], np.diff(
            case.layout.cu_router_rows))).astype(np.int32),
    )  # fmt: skip
    expected = Case(host, case.first_positions, None, None, None).expected()
    assert np.array_equal(second.layout.cu_seqlens.cpu().numpy(), expected["cu_seqlens"])
    assert np.array_equal(second.layout.router_rows.cpu().numpy(), expected["router_rows"])
    rows = int(second.layout.cu_seqlens[-1])
    for name in ("positions", "cache_rows"):
        found = getattr(second.layout, name)
        assert np.array_equal(found[:rows].cpu().numpy(), expected[name][:rows]), name
        assert not found[rows:].any()


EMPTY = Case(
    dataclasses.replace(
        random_case(np.random.default_rng(0), 1, "static").layout,
        lengths=np.zeros(0, dtype=np.int32), first_rows=np.zeros(0, dtype=np.int32),
        image_start=np.zeros(0, dtype=np.int32), grids=np.zeros((0, 2), dtype=np.int32),
        router_rows=np.zeros(0, dtype=np.int32), cu_router_rows=np.zeros(1, dtype=np.int32),
    ),
    np.zeros(0, dtype=np.int32), None, None, None,
)  # fmt: skip


def test_bad_arguments_are_refused_by_name() -> None:
    # One sequence of 4 rows of text, a grid of 4 x 5 and 2 rows more, the router's the last but one.
    good: dict[str, Any] = {
        "cu_seqlens": int32([0, 26]), "first_positions": int32([9]), "first_cache_rows": int32([0]),
        "image_start": int32([4]), "grids": int32([[4, 5]]), "router_rows": int32([24]),
        "cu_router_rows": int32([0, 1]),
        "positions": int32([0] * 26), "cache_rows": int32([0] * 26),
        "kernels": int32(KERNELS), "routed": int32([1]), "probs": torch.rand(1, 4), "forced": int32([-1]),
    }  # fmt: skip

    def run(**change: Any) -> ops.Advance:
        values = good | change
        names = [field.name for field in dataclasses.fields(ops.DeviceLayout)]
        rest = {name: value for name, value in values.items() if name not in names}
        return ops.advance_layout(
            ops.DeviceLayout(**{name: values[name] for name in names}), min_visual_tokens=16, **rest
        )

    assert run().layout.cu_seqlens.tolist() == [0, 14]  # the kernel 1x2: 4 x 5 becomes 4 x 2
    cases: list[tuple[dict[str, Any], str]] = [
        ({"grids": int32([4, 5])}, r"grids has shape \[2\]"),
        ({"cu_seqlens": int32([0, 26, 26])}, r"cu_seqlens has shape \[3\]"),
        ({"first_positions": int32([])}, "first_positions has shape"),
        ({"first_cache_rows": int32([])}, "first_cache_rows has shape"),
        ({"cache_rows": int32([0])}, r"cache_rows has shape \[1\], expected \[max_tokens=26\]"),
        ({"positions": torch.zeros(26)}, "positions has dtype float32, expected int32"),
        ({"image_start": torch.zeros(1)}, "image_start has dtype float32, expected int32"),
        ({"kernels": int32([[1, 1, 1]])}, "kernels has shape"),
        ({"kernels": torch.zeros(0, 2, dtype=torch.int32)}, "num_experts is 0"),
        ({"routed": None}, "routed and probs must be given together"),
        ({"probs": torch.rand(1, 3)}, r"probs has shape \[1, 3\]"),
        ({"forced": int32([0, 0])}, "forced has shape"),
    ]
    content: list[tuple[dict[str, Any], str]] = [
        ({"cu_seqlens": int32([1, 26])}, r"cu_seqlens\[0\] is 1"),
        ({"cu_seqlens": int32([0, 27])}, "the end of cu_seqlens is 27, expected 0 to 26"),
        ({"cu_seqlens": int32([0, 23])}, r"grids\[0\] is 4x5 from row 4 on, but the sequence has 23 rows"),
        ({"image_start": int32([-1])}, r"grids\[0\] is 4x5 from row -1 on"),
        ({"grids": int32([[-4, 5]])}, r"grids\[0\] is -4x5, expected no negative"),
        ({"router_rows": int32([26])}, r"router_rows\[0\] is 26, expected a row of sequence 0, 0 to 25"),
        ({"cu_router_rows": int32([0, 2])}, r"cu_router_rows\[1\] is 2"),
        ({"first_positions": int32([-1])}, "first_positions has the entry -1"),
        ({"first_positions": int32([2**31 - 26])}, "first_positions has the entry 2147483622"),
        ({"first_cache_rows": int32([-1])}, "first_cache_rows has the entry -1"),
        ({"kernels": int32([[0, 1]] * 4)}, "kernels has the entry 0"),
        ({"routed": int32([4])}, "routed has the entry 4"),
        ({"forced": int32([-2])}, "forced has the entry -2"),
    ]
    if not good["grids"].is_cuda:  # what is on a GPU is not read by the host
        cases += content
    for change, message in cases:
        with pytest.raises(KernelArgumentError, match=message):
            run(**change)
