"""A dense weight is one tensor of the engine, taken as it is."""

from __future__ import annotations

import pytest
import torch

from dpn_rt.model.linear import linear_specs, load_linear
from dpn_rt.model.weights.dense import DenseWeight, can_prepack
from dpn_rt.model.weights.weight import Weight
from dpn_rt.schema.weights import WeightSpec
from tests.skips import NO_ONEDNN


def test_what_is_stored() -> None:
    kind: type[Weight] = DenseWeight
    assert kind.specs(40, 48, torch.bfloat16) == {"weight": WeightSpec((40, 48), torch.bfloat16)}
    specs = dict(linear_specs("layers.0.qkv", 40, 48, torch.bfloat16, bias=True, fused=(24, 8, 8)))
    assert specs == {
        "layers.0.qkv.weight": WeightSpec((40, 48), torch.bfloat16),
        "layers.0.qkv.bias": WeightSpec((40,), torch.bfloat16),
    }
    assert specs["layers.0.qkv.weight"].parts == [(24, 48), (8, 48), (8, 48)]
    assert specs["layers.0.qkv.bias"].parts == [(24,), (8,), (8,)]
    assert list(dict(linear_specs("head", 40, 48, torch.float32, bias=False))) == ["head.weight"]


@pytest.mark.parametrize("prepack", [False, True])
def test_its_tensor_is_not_copied(prepack: bool) -> None:
    if prepack and not can_prepack(torch.bfloat16):
        pytest.skip(NO_ONEDNN)
    tensors = {"layers.0.o.weight": torch.randn(40, 48).bfloat16()}
    weight = DenseWeight.load(tensors, "layers.0.o", prepack=prepack)
    assert weight.num_bytes == 40 * 48 * 2
    linear, x = load_linear(tensors, "layers.0.o", prepack=False), torch.randn(1, 48).bfloat16()
    before = linear(x)
    tensors["layers.0.o.weight"].zero_()
    assert before.any() and not linear(x).any()


def test_a_bias_is_found_by_name() -> None:
    tensors = {"fc1.weight": torch.zeros(4, 8), "fc1.bias": torch.arange(4.0)}
    assert torch.equal(load_linear(tensors, "fc1", prepack=False)(torch.ones(1, 8)), torch.arange(4.0)[None])
