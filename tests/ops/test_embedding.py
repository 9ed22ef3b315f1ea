from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from dpn_rt.model.weights.tiles import pack_int8

DEVICES = ["cpu"]


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    vocab_size=st.sampled_from([1, 15, 16, 17, 40]),
    hidden_size=st.sampled_from([1, 3, 4, 5, 64, 130]),
    num_tokens=st.sampled_from([0, 1, 2, 9, 300]),
    in_tiles=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rows(
    dtype: torch.dtype, vocab_size: int, hidden_size: int, num_tokens: int, in_tiles: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, vocab_size, (num_tokens,), generator=generator)
    out = torch.full((num_tokens, hidden_size), torch.nan, dtype=dtype)
    if in_tiles:
        q = torch.randint(-128, 128, (vocab_size, hidden_size), generator=generator, dtype=torch.int8)
        scale = torch.rand(vocab_size, generator=generator)
        wanted = (q.double() * scale.double()[:, None]).float().to(dtype)
        found = ops.embedding(pack_int8(q), ids, scale, out=out)
    else:
        wanted = torch.randn(vocab_size, hidden_size, generator=generator).to(dtype)
        found = ops.embedding(wanted, ids, out=out)
        assert torch.equal(ops.embedding(wanted, ids), found)
    assert found is out and torch.equal(found, wanted[ids.clamp_min(0)])


def good(in_tiles: bool) -> dict[str, Any]:
    ids = torch.tensor([3, -1, 19])
    if not in_tiles:
        return {"table": torch.rand(20, 10), "token_ids": ids, "out": torch.zeros(3, 10)}
    tiles = torch.zeros(2, 3, 16, 4, dtype=torch.uint8)
    return {"table": tiles, "token_ids": ids, "scale": torch.ones(20), "out": torch.zeros(3, 10)}


@pytest.mark.parametrize(
    ("in_tiles", "argument", "value", "message"),
    [
        (False, "token_ids", torch.tensor([3, 20, 1]), r"token_ids\[1\] is 20, expected 0 to 19"),
        (False, "token_ids", torch.tensor([3, 2], dtype=torch.int32), "token_ids has dtype int32"),
        (False, "token_ids", torch.tensor([3, 2]), r"out has shape \[3, 10\]"),
        (False, "table", torch.rand(20, 11), "table has shape"),
        (False, "table", torch.rand(20, 10).bfloat16(), "table has dtype bfloat16"),
        (False, "table", torch.rand(10, 20).t(), "table has stride 20 in its last dimension"),
        (False, "table", torch.rand(0, 10), "table has no rows, expected at least 1"),
        (False, "scale", torch.ones(20), "table has"),
        (False, "out", torch.zeros(3, 10).half(), "out has dtype float16"),
        (True, "scale", torch.ones(33), "table has shape"),
        (True, "scale", torch.ones(20).double(), "scale has dtype float64"),
        (True, "table", torch.zeros(2, 2, 16, 4, dtype=torch.uint8), "table has shape"),
        (True, "table", torch.zeros(2, 3, 16, 4, dtype=torch.int8), "table has dtype int8"),
    ],
)
def test_bad_arguments_are_refused_by_name(in_tiles: bool, argument: str, value: Tensor, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=f"embedding: {message}"):
        ops.embedding(**{**good(in_tiles), argument: value})


def test_overlaps_are_refused() -> None:
    memory = torch.zeros(20, 10)
    with pytest.raises(KernelArgumentError, match="embedding: out shares memory with table"):
        ops.embedding(memory, torch.tensor([3]), out=memory[:1])
