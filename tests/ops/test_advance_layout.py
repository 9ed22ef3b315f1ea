from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from tests.ops.advance_layout_cases import KERNELS, MIN_VISUAL_TOKENS, MODES, Case, Image, Rows, random_case

FIELDS = [field.name for field in dataclasses.fields(ops.DeviceLayout)]


def int32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def device_layout(case: Case) -> ops.DeviceLayout:
    fields = {name: int32(value.tolist()).reshape(value.shape) for name, value in case.layout().items()}
    unread = torch.full((case.num_rows,), -1, dtype=torch.int32)
    return ops.DeviceLayout(**fields, positions=unread, cache_rows=unread)


def arguments(case: Case) -> dict[str, Any]:
    return {
        "layout": device_layout(case),
        "kernels": int32(KERNELS),
        "min_visual_tokens": MIN_VISUAL_TOKENS,
        "routed": None if case.routed is None else int32(case.routed),
        "probs": None if case.probs is None else torch.tensor(case.probs),
        "forced": None if case.forced is None else int32(case.forced),
    }


def new_random() -> np.random.Generator:
    seed = torch.initial_seed()
    return np.random.default_rng(seed)


def assert_advances(case: Case) -> ops.Advance:
    advance = ops.advance_layout(**arguments(case))
    results = {"chosen": advance.chosen, "experts": advance.experts, "scales": advance.scales}
    found = dataclasses.asdict(advance.layout) | results
    for name, value in case.expected().items():
        assert np.array_equal(found[name].cpu().numpy(), value), name
    return advance


@pytest.mark.parametrize("num_seqs", [0, 1, 5, 33, 70])
@pytest.mark.parametrize("max_images", [0, 1, 2, 7])
@pytest.mark.parametrize("mode", MODES)
def test_advance_layout(num_seqs: int, max_images: int, mode: str) -> None:
    assert_advances(random_case(new_random(), num_seqs, mode, max_images))


def test_images_next_to_each_other_and_at_both_ends() -> None:
    """Images with a router row between them, one of them skipped and one too small: each changes as it would alone."""
    starts, grids = [0, 20, 37, 46, 62], [(4, 5), (4, 4), (3, 3), (16, 1), (6, 4)]
    rows = Rows(86, tuple(map(Image, starts, grids)), (36,), 40, 7)
    case = Case((rows,), np.array([2], dtype=np.int32), np.array([[0.1, 0.2, 0.6, 0.1]], dtype=np.float32), None)
    after = assert_advances(case)
    assert after.chosen.tolist() == [2, 2, -1, 2, 2]
    assert after.experts.tolist() == [2, 2, -1, -1, 2]
    assert after.layout.image_starts.tolist() == [0, 4, 9, 18, 34]
    assert after.layout.grids.tolist() == [[2, 2], [2, 2], [3, 3], [16, 1], [3, 2]]
    assert after.layout.router_rows.tolist() == [8]
    assert after.layout.cu_seqlens.tolist() == [0, 40]


def test_two_boundaries_after_each_other() -> None:
    """A returned layout can be the input of the next call, with its rows after the last one."""
    case = random_case(new_random(), 12, "router")
    first = ops.advance_layout(**arguments(case)).layout
    second = ops.advance_layout(first, int32(KERNELS), MIN_VISUAL_TOKENS)
    sequences = tuple(s.pooled(experts) for s, experts in zip(case.sequences, case.experts(), strict=True))
    expected = Case(sequences, None, None, None).expected()
    for name in ("cu_seqlens", "image_starts", "grids", "router_rows"):
        assert np.array_equal(getattr(second.layout, name).cpu().numpy(), expected[name]), name
    rows = int(second.layout.cu_seqlens[-1])
    for name in ("positions", "cache_rows"):
        found = getattr(second.layout, name)
        assert np.array_equal(found[:rows].cpu().numpy(), expected[name][:rows]), name
        assert not found[rows:].any()


# One sequence of 4 rows of text, a grid of 4 x 5, 2 rows of text, the second of them the router's, and a grid of 2 x 8.
GOOD = Case((Rows(42, (Image(4, (4, 5)), Image(26, (2, 8))), (25,), 9, 0),), np.ones(1, np.int32), None, None)

BAD_SHAPES: list[tuple[dict[str, Any], str]] = [
    ({"cu_seqlens": [0, 42, 42]}, r"cu_seqlens has shape \[3\], expected \[num_seqs \+ 1=2\]"),
    ({"first_positions": [0.5]}, "first_positions has dtype float32, expected int32"),
    (
        {"first_positions": torch.zeros(0, dtype=torch.int32)},
        r"first_cache_rows has shape \[1\], expected \[num_seqs=0\]",
    ),
    ({"first_cache_rows": [0, 0]}, r"first_cache_rows has shape \[2\], expected \[num_seqs=1\]"),
    ({"cu_images": [2]}, r"cu_images has shape \[1\]"),
    ({"image_starts": [4]}, r"grids has shape \[2, 2\], expected \[num_images=1, 2=2\]"),
    ({"image_starts": [4.0, 26.0]}, "image_starts has dtype float32, expected int32"),
    ({"grids": [4, 5]}, r"grids has shape \[2\]"),
    ({"cache_rows": [0]}, r"cache_rows has shape \[1\], expected \[max_tokens=42\]"),
    ({"positions": [0.5] * 42}, "positions has dtype float32, expected int32"),
    ({"kernels": [[1, 1, 1]]}, "kernels has shape"),
    ({"kernels": torch.zeros(0, 2, dtype=torch.int32)}, "num_experts is 0"),
    ({"routed": None}, "routed and probs must be given together"),
    ({"probs": [[0.1, 0.2, 0.7]]}, r"probs has shape \[1, 3\]"),
    ({"forced": [0, 0]}, "forced has shape"),
]
BAD_CONTENT: list[tuple[dict[str, Any], str]] = [
    ({"cu_seqlens": [1, 42]}, r"cu_seqlens\[0\] is 1"),
    ({"cu_seqlens": [0, 43]}, "the end of cu_seqlens is 43, expected 0 to 42"),
    ({"cu_seqlens": [0, 41]}, r"grids\[1\] is 2x8 from row 26 on, but the sequence has 41 rows"),
    ({"cu_images": [0, 1]}, r"cu_images\[1\] is 1, expected num_images=2"),
    ({"cu_images": [1, 2]}, r"cu_images\[0\] is 1, expected 0"),
    ({"image_starts": [-1, 26]}, r"grids\[0\] is 4x5 from row -1 on"),
    ({"image_starts": [4, 23]}, r"image_starts\[1\] is 23, expected at least 24, where the image before it ends"),
    ({"image_starts": [20, 4]}, r"image_starts\[1\] is 4, expected at least 40, where the image before it ends"),
    ({"image_starts": [4, 27]}, r"grids\[1\] is 2x8 from row 27 on, but the sequence has 42 rows"),
    ({"image_starts": [2**31 - 1, 26]}, r"grids\[0\] is 4x5 from row 2147483647 on"),
    ({"grids": [[4, 5], [2**31 - 1, 2**31 - 1]]}, r"grids\[1\] is 2147483647x2147483647 from row 26 on"),
    ({"grids": [[-4, 5], [2, 8]]}, r"grids\[0\] is -4x5, expected no negative"),
    ({"router_rows": [42]}, r"router_rows\[0\] is 42, expected a row of sequence 0, 0 to 41"),
    ({"cu_router_rows": [0, 2]}, r"cu_router_rows\[1\] is 2, expected num_router_rows=1"),
    ({"first_positions": [-1]}, "first_positions has the entry -1"),
    ({"first_positions": [2**31 - 42]}, "first_positions has the entry 2147483606"),
    ({"first_cache_rows": [-1]}, "first_cache_rows has the entry -1"),
    ({"kernels": [[0, 1]] * 4}, "kernels has the entry 0"),
    ({"routed": [4]}, "routed has the entry 4"),
    ({"forced": [-2]}, "forced has the entry -2"),
]


def run(**change: Any) -> ops.Advance:
    """The good case with some arguments changed."""
    given = arguments(GOOD) | {"probs": torch.rand(1, 4), "forced": int32([-1])}
    for name, value in change.items():
        new = torch.tensor(value) if isinstance(value, list) else value
        new = new.int() if isinstance(value, list) and not new.is_floating_point() else new
        new = None if new is None else new.to(torch.get_default_device())  # tensors of the table are on the host
        if name in FIELDS:
            given["layout"] = dataclasses.replace(given["layout"], **{name: new})
        else:
            given[name] = new
    return ops.advance_layout(**given)


def test_bad_arguments_are_refused_by_name() -> None:
    good = run()
    assert good.layout.cu_seqlens.tolist() == [0, 22]  # the kernel 1x2: 4 x 5 becomes 4 x 2, and 2 x 8 becomes 2 x 4
    is_read = not good.chosen.is_cuda  # the host does not read tensors of a GPU
    for change, message in BAD_SHAPES + (BAD_CONTENT if is_read else []):
        with pytest.raises(KernelArgumentError, match=message):
            run(**change)
