"""The projector against torch.nn, and its configuration against its weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpn_rt.model.vision.projector import Projector, ProjectorConfig, ProjectorType

INPUT_SIZE, HIDDEN_SIZE = 24, 40


def modules(kind: ProjectorType) -> nn.Sequential:
    first, second = nn.Linear(INPUT_SIZE, HIDDEN_SIZE), nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)
    return nn.Sequential(first, nn.GELU(), second) if kind == "mlp2x_gelu" else nn.Sequential(first)


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear"])
@pytest.mark.parametrize("num_tokens", [1, 7, 64])
def test_equals_torch(kind: ProjectorType, num_tokens: int) -> None:
    reference, features = modules(kind), torch.randn(num_tokens, INPUT_SIZE)
    weights = {f"projector.{name}": weight.detach() for name, weight in reference.state_dict().items()}
    with torch.inference_mode():
        actual = Projector(ProjectorConfig(kind, INPUT_SIZE), weights, prepack=False).forward(features)
        torch.testing.assert_close(actual, reference(features), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear"])
def test_weights_and_work_are_those_of_the_layers(kind: ProjectorType) -> None:
    config = ProjectorConfig(kind, INPUT_SIZE)
    expected = {f"projector.{name}": tuple(weight.shape) for name, weight in modules(kind).state_dict().items()}
    specs = dict(config.weight_specs(HIDDEN_SIZE, torch.bfloat16))
    assert {name: spec.shape for name, spec in specs.items()} == expected
    assert {spec.dtype for spec in specs.values()} == {torch.bfloat16}
    matrices = sum(rows * columns for rows, columns in (shape for shape in expected.values() if len(shape) == 2))
    assert config.flops(9, HIDDEN_SIZE) == 2 * 9 * matrices
