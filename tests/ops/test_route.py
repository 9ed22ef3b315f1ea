from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dpn_rt import ops
from dpn_rt.errors import KernelArgumentError
from tests.ops.conftest import assert_close_to_reference, random_rows, seeded


def offsets(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


class Router:
    """Random router weights; `hidden` False makes a v2 router, which has only a predictor."""

    def __init__(self, generator: torch.Generator, hidden_size: int, num_experts: int, hidden: bool) -> None:
        router_size = max(hidden_size // 4, 1) if hidden else hidden_size
        self.predictor = random_rows(generator, (num_experts, router_size), torch.float32, 6 / router_size**0.5)
        self.norm_weight = random_rows(generator, (hidden_size,), torch.float32, 0.3, 1.0) if hidden else None
        self.norm_bias = random_rows(generator, (hidden_size,), torch.float32, 0.3) if hidden else None
        shape = (router_size, hidden_size)
        self.hidden_weight = random_rows(generator, shape, torch.float32, 3 / hidden_size**0.5) if hidden else None

    def __call__(self, hidden: Tensor, rows: Tensor, counts: list[int], eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        weights = (self.predictor, self.norm_weight, self.norm_bias, self.hidden_weight)
        return ops.route(hidden, rows, offsets(counts), *weights, eps)

    def logits(self, hidden: Tensor, rows: list[int], dtype: torch.dtype) -> Tensor:
        x = hidden[rows].to(dtype).mean(0)
        if self.hidden_weight is not None:
            assert self.norm_weight is not None and self.norm_bias is not None
            x = functional.layer_norm(x, x.shape, self.norm_weight.to(dtype), self.norm_bias.to(dtype), 1e-5)
            x = functional.gelu(self.hidden_weight.to(dtype) @ x)
        return self.predictor.to(dtype) @ x


def draw(generator: torch.Generator, num_tokens: int, counts: list[int]) -> Tensor:
    return torch.randint(0, num_tokens, (sum(counts),), generator=generator, dtype=torch.int32)


@pytest.mark.parametrize("hidden", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("counts", [[1], [1, 0, 3], [2] * 11, [0], []], ids=str)
@pytest.mark.parametrize("sizes", [(4, 1), (9, 2), (64, 3), (130, 3), (2048, 3), (40, 21)], ids=str)
def test_route(
    generator: torch.Generator, dtype: torch.dtype, sizes: tuple[int, int], counts: list[int], hidden: bool
) -> None:
    hidden_size, num_experts = sizes
    router = Router(generator, hidden_size, num_experts, hidden)
    x = random_rows(generator, (50, hidden_size), dtype, 2.0, 0.5)
    rows = draw(generator, 50, counts)
    probs, experts = router(x, rows, counts)
    assert probs.shape == (len(counts), num_experts) and probs.dtype == torch.float32
    assert experts.shape == (len(counts),) and experts.dtype == torch.int32
    for b, group in enumerate(rows.split(counts) if counts else []):
        if counts[b] == 0:
            assert experts[b] == -1
            assert (probs[b] == 0).all()
            continue
        exact = router.logits(x, group.tolist(), torch.float64)
        reference = (exact / 10).softmax(0)
        same = (router.logits(x, group.tolist(), torch.float32) / 10).softmax(0)
        assert_close_to_reference(probs[b], reference, same, 1e-6)
        assert probs[b].sum().item() == pytest.approx(1, abs=1e-6)
        assert experts[b] == exact.argmax() or exact.max() - exact[int(experts[b])] < 1e-4


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    hidden=st.booleans(),
)
def test_a_batch_gives_each_sequence_what_it_gets_alone(
    seed: int, counts: list[int], dtype: torch.dtype, hidden: bool
) -> None:
    generator = seeded(seed)
    router = Router(generator, 72, 3, hidden)
    x = random_rows(generator, (30, 72), dtype)
    rows = draw(generator, 30, counts)
    probs, experts = router(x, rows, counts)
    for b, group in enumerate(rows.split(counts)):
        alone_probs, alone_expert = router(x, group, [counts[b]])
        assert torch.equal(alone_probs[0], probs[b])
        assert alone_expert[0] == experts[b]


def test_the_first_of_equal_experts_is_chosen(generator: torch.Generator) -> None:
    x = random_rows(generator, (3, 24), torch.float32)
    row = random_rows(generator, (1, 24), torch.float32)
    predictor = torch.cat([-row, row, row, -row]) * torch.sign(row @ x[1])
    probs, experts = ops.route(x, torch.tensor([1], dtype=torch.int32), offsets([1]), predictor)
    assert experts.tolist() == [1]
    assert probs[0, 1] == probs[0, 2]


@pytest.mark.parametrize("hidden", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_expert_stays_in_range_whatever_the_input(
    generator: torch.Generator, dtype: torch.dtype, hidden: bool, value: float
) -> None:
    router = Router(generator, 40, 3, hidden)
    x = random_rows(generator, (4, 40), dtype)
    x[2, 5] = value
    probs, experts = router(x, torch.tensor([0, 2, 3], dtype=torch.int32), [1, 1, 1])
    assert 0 <= experts[1] < 3
    assert probs[[0, 2]].isfinite().all(), "another sequence was touched"
    if hidden or value != value:
        assert probs[1].isnan().all()


@pytest.mark.parametrize("hidden", [True, False], ids=["v1", "v2"])
def test_biases_shift_the_logits_by_level(generator: torch.Generator, dtype: torch.dtype, hidden: bool) -> None:
    router = Router(generator, 40, 3, hidden)
    weights = (router.predictor, router.norm_weight, router.norm_bias, router.hidden_weight)
    x, rows = random_rows(generator, (4, 40), dtype), torch.tensor([0, 2, 3, 1], dtype=torch.int32)
    biases, levels = torch.tensor([0.0, -7.5, 30.0, 0.5, 2.0]), torch.tensor([2, 0, 1], dtype=torch.int32)
    counts = [1, 1, 1, 0, 1]
    probs, experts = ops.route(x, rows, offsets(counts), *weights, biases=biases, levels=levels)
    plain, _ = ops.route(x, rows, offsets(counts), *weights)
    for b, row in ((0, 0), (1, 2), (2, 3), (4, 1)):
        exact, same = (
            ((router.logits(x, [row], kind) + (biases[b] * levels).to(kind)) / 10).softmax(0)
            for kind in (torch.float64, torch.float32)
        )
        assert_close_to_reference(probs[b], exact, same, 1e-6)
        assert experts[b] == probs[b].argmax()
    assert torch.equal(probs[0], plain[0]), "a bias of 0 changed something"
    assert experts[3] == -1 and not probs[3].any()


def test_strided_hidden_rows(generator: torch.Generator, dtype: torch.dtype) -> None:
    router = Router(generator, 32, 3, True)
    wide = random_rows(generator, (6, 50), dtype)
    rows = torch.tensor([5, 0], dtype=torch.int32)
    strided, packed = router(wide[:, 7:39], rows, [1, 1]), router(wide[:, 7:39].contiguous(), rows, [1, 1])
    assert torch.equal(strided[0], packed[0])


@pytest.mark.cpu_only
def test_bad_arguments_are_refused_by_name(generator: torch.Generator) -> None:
    router = Router(generator, 16, 3, True)
    arguments = {
        "hidden": torch.zeros(5, 16), "router_rows": torch.tensor([1, 4], dtype=torch.int32),
        "cu_router_rows": offsets([1, 1]), "predictor": router.predictor, "norm_weight": router.norm_weight,
        "norm_bias": router.norm_bias, "hidden_weight": router.hidden_weight, "eps": 1e-5,
    }  # fmt: skip
    ops.route(**arguments)  # type: ignore[arg-type]
    cases: list[tuple[dict[str, object], str]] = [
        ({"hidden": torch.zeros(16)}, r"hidden has shape \[16\]"),
        ({"hidden": torch.zeros(5, 16).half()}, "hidden has dtype float16"),
        ({"hidden": torch.zeros(5, 8)}, r"norm_weight has shape \[16\], expected \[hidden_size=8\]"),
        ({"router_rows": torch.tensor([1, 5], dtype=torch.int32)}, "router_rows has the entry 5 at flat index 1"),
        ({"router_rows": torch.tensor([-1, 0], dtype=torch.int32)}, "router_rows has the entry -1"),
        ({"router_rows": torch.tensor([1, 4])}, "router_rows has dtype int64"),
        ({"cu_router_rows": offsets([1, 2])}, r"cu_router_rows\[2\] is 3, expected"),
        ({"cu_router_rows": offsets([3, -1])}, r"cu_router_rows\[2\] is 2, expected at least 3"),
        ({"cu_router_rows": torch.tensor([], dtype=torch.int32)}, "cu_router_rows is empty"),
        ({"predictor": torch.zeros(3, 16)}, r"predictor has shape \[3, 16\], expected .*router_size=4"),
        ({"predictor": router.predictor.bfloat16()}, "predictor has dtype bfloat16, expected float32"),
        ({"predictor": torch.zeros(0, 4)}, "num_experts=0"),
        ({"norm_weight": None}, "must be given together"),
        ({"norm_bias": None}, "must be given together"),
        ({"hidden_weight": None}, "must be given together"),
        ({"norm_bias": torch.zeros(15)}, r"norm_bias has shape \[15\]"),
        ({"hidden_weight": torch.zeros(4, 15)}, r"hidden_weight has shape \[4, 15\]"),
        ({"hidden_weight": torch.zeros(16, 4).t()}, "hidden_weight has stride"),
        ({"eps": -1.0}, "eps is -1"),
        ({"biases": torch.zeros(2)}, "biases and levels must be given together"),
        ({"levels": offsets([1, 1])}, "biases and levels must be given together"),
        ({"biases": torch.zeros(3), "levels": offsets([1, 1])}, r"biases has shape \[3\], expected \[num_seqs=2\]"),
        ({"biases": torch.zeros(2), "levels": offsets([1])}, r"levels has shape \[2\], expected \[num_experts=3\]"),
        ({"biases": torch.tensor([0, float("inf")]), "levels": offsets([1, 1])}, "biases has the entry inf at flat"),
    ]
    for change, message in cases:
        with pytest.raises(KernelArgumentError, match=message):
            ops.route(**{**arguments, **change})  # type: ignore[arg-type]
