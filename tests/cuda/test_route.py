from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.cuda.conftest import Guards, assert_near, int32, offsets
from tests.cuda.emulated import KernelError, Kernels
from tests.ops.conftest import random_rows

EPS = 1e-5


class Router:
    def __init__(
        self, guards: Guards, generator: torch.Generator, hidden_size: int, router_size: int, num_experts: int
    ) -> None:
        def weights(*shape: int, scale: float = 1.0) -> Tensor:
            return guards.put(random_rows(generator, shape, torch.float32, scale))

        self.guards, self.has_hidden = guards, router_size > 0
        self.norm_weight, self.norm_bias = weights(hidden_size), weights(hidden_size)
        self.hidden_weight = weights(router_size, hidden_size, scale=hidden_size**-0.5)
        self.predictor = weights(num_experts, router_size or hidden_size, scale=3.0)

    def run(
        self, kernels: Kernels, hidden: Tensor, rows: list[list[int]], bias: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        put = self.guards.put
        router_rows, cu_router_rows = (
            put(int32([row for own in rows for row in own])),
            put(offsets([len(r) for r in rows])),
        )
        probs = self.guards.poisoned(len(rows), self.predictor.shape[0], dtype=torch.float32)
        experts = self.guards.poisoned(len(rows), dtype=torch.int32)
        size = kernels.number("route_workspace_size", hidden, cu_router_rows, self.predictor)
        layer = [self.norm_weight, self.norm_bias, self.hidden_weight] if self.has_hidden else [None] * 3
        workspace = self.guards.poisoned(size, dtype=torch.float32)
        biases, levels = (put(bias[0]), put(bias[1])) if bias else (None, None)
        kernels.route(
            probs, experts, hidden, router_rows, cu_router_rows, self.predictor, *layer, EPS, biases, levels, workspace
        )
        return probs, experts

    def reference(self, hidden: Tensor, rows: list[list[int]], added: Tensor | float = 0.0) -> Tensor:
        probs = torch.zeros(len(rows), self.predictor.shape[0], dtype=torch.float64)
        for b, own in enumerate(rows):
            if not own:
                continue
            x = hidden[own].double().mean(0)
            if self.has_hidden:
                shape = [x.shape[0]]
                x = functional.layer_norm(x, shape, self.norm_weight.double(), self.norm_bias.double(), EPS)
                x = functional.gelu(self.hidden_weight.double() @ x)
            own_added = added[b] if isinstance(added, Tensor) else added
            probs[b] = ((self.predictor.double() @ x + own_added) / 10).softmax(0)
        return probs


# Sizes near multiples of parts of 1,024 columns, turns of 128 columns and groups of 32 units.
@pytest.mark.parametrize(
    ("hidden_size", "router_size"),
    [*product([1, 33, 128, 600], [0, 5, 32]), (1024, 33), (1028, 64), (1027, 31), (2050, 70), (2100, 0)],
)
def test_route(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, hidden_size: int, router_size: int
) -> None:
    router = Router(guards, generator, hidden_size, router_size, 3)
    hidden = guards.put(random_rows(generator, (20, hidden_size), dtype, 2.0, 1.0))
    rows = [[3], [], [4, 9, 19], [0], [1]] + [[i % 20] for i in range(40)]  # more than a block takes in a turn
    probs, experts = router.run(kernels, hidden, rows)
    expected = router.reference(hidden, rows)
    assert_near(probs, expected, 4.0, 1e-5)
    for b, own in enumerate(rows):
        assert experts[b] == (probs[b].argmax() if own else -1)
    # A sequence alone gets bit for bit the same result as in the batch.
    alone, _ = router.run(kernels, hidden, [rows[2]])
    assert torch.equal(alone[0], probs[2])


@pytest.mark.parametrize("router_size", [0, 5])
def test_biases(
    kernels: Kernels, guards: Guards, generator: torch.Generator, dtype: torch.dtype, router_size: int
) -> None:
    router = Router(guards, generator, 48, router_size, 3)
    hidden = guards.put(random_rows(generator, (6, 48), dtype, 2.0))
    rows = [[0], [1], [], [2, 3], [5]]
    biases, levels = torch.tensor([0.0, -7.5, 3.0, 20.0, 0.25]), int32([2, 0, 1])
    probs, experts = router.run(kernels, hidden, rows, (biases, levels))
    assert_near(probs, router.reference(hidden, rows, biases.double()[:, None] * levels), 4.0, 1e-5)
    assert experts.tolist() == [int(probs[b].argmax()) if own else -1 for b, own in enumerate(rows)]
    assert torch.equal(probs[0], router.run(kernels, hidden, rows)[0][0]), "a bias of 0 changed something"


def test_nan_leaves_a_valid_expert(kernels: Kernels, guards: Guards, generator: torch.Generator) -> None:
    router = Router(guards, generator, 64, 16, 2)
    hidden = random_rows(generator, (4, 64), torch.bfloat16)
    hidden[1, 5] = float("nan")
    probs, experts = router.run(kernels, guards.put(hidden), [[0], [1], [2]])
    assert probs[1].isnan().all()
    assert experts[1] == 0
    assert not probs[[0, 2]].isnan().any()


def test_a_short_workspace_is_refused(kernels: Kernels, guards: Guards, generator: torch.Generator) -> None:
    router = Router(guards, generator, 16, 4, 2)
    hidden = torch.zeros(1, 16, dtype=torch.bfloat16)
    with pytest.raises(KernelError, match="workspace_size is 3, expected 52 to"):
        kernels.route(
            torch.empty(1, 2), int32([0]), hidden, int32([0]), int32([0, 1]), router.predictor, router.norm_weight,
            router.norm_bias, router.hidden_weight, EPS, None, None, torch.empty(3),
        )  # fmt: skip
