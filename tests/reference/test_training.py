"""Drawing experts, the routing loss, and which parameters its gradients reach."""

from __future__ import annotations

import collections
import math

import pytest
import torch

from dpn_rt.model.reduction.pooling_config import BoundaryConfig, PoolingConfig
from dpn_rt.reference import Boundary, BoundaryRecord, EagerDpn, PyramidTrace, SampleLayout, routing_loss
from tests.golden_cases import case_named

KERNELS = ((1, 1), (1, 2), (2, 2))


def load(name: str) -> EagerDpn:
    case = case_named(name)
    return EagerDpn.from_weights(case.config, case.canonical_weights().items())


def trace(*probs: list[float] | None, scores: tuple[int, ...] = (0, 1, 2)) -> PyramidTrace:
    records = []
    for p in probs:
        tensor = None if p is None else torch.tensor(p, requires_grad=True)
        records.append(BoundaryRecord(None if p is None else 0, None, tensor, scores))
    return PyramidTrace(tuple(records), (), (), ())


def boundary(kernels: tuple[tuple[int, int], ...] = KERNELS, hidden_size: int = 8) -> Boundary:
    config = BoundaryConfig(0, kernels)
    return Boundary(config, PoolingConfig((config,), "adaptive", "max", "v2", False), hidden_size)


def test_routing_loss_by_hand() -> None:
    # Boundary 0: mean(2 * 0.5, 1 * 0.6) = 0.8 -> hinge 0.7. Boundary 1: mean(2 * 0.9) = 1.8 -> 0; the skipped sample
    # does not count. Boundary 2: skipped by both, no term. So (0.7 + 0) / 2.
    traces = [
        trace([0.2, 0.3, 0.5], [0.05, 0.05, 0.9], None),
        trace([0.3, 0.6, 0.1], None, None),
    ]
    loss = routing_loss(traces)
    assert loss.item() == pytest.approx(0.35)
    loss.backward()
    first, second = traces[0].records[0].probs, traces[1].records[0].probs
    assert first is not None and second is not None and first.grad is not None and second.grad is not None
    # d/dp of mean over 2 boundaries of (1.5 - mean over 2 samples of s * p): -s / 4 at the argmax, nothing elsewhere.
    assert first.grad.tolist() == pytest.approx([0.0, 0.0, -0.5])
    assert second.grad.tolist() == pytest.approx([0.0, -0.25, 0.0])


def test_routing_loss_target_and_nothing_routed() -> None:
    assert routing_loss([trace([0.0, 0.0, 1.0])], target=2.5).item() == pytest.approx(0.5)
    assert routing_loss([trace(None, None)]).item() == 0.0
    assert routing_loss([]).item() == 0.0


def test_scores_follow_compression_whatever_the_order_of_experts() -> None:
    assert boundary(((2, 2), (1, 1), (1, 2))).scores == (2, 0, 1)
    assert boundary(((1, 1), (2, 2))).scores == (0, 1)
    assert boundary(((1, 1), (2, 2), (4, 4))).scores == (0, 1, 2)


def test_drawing_follows_the_probabilities() -> None:
    module = boundary().train()
    probs = torch.tensor([0.6, 0.3, 0.1])
    counts = collections.Counter(module.choose(probs, (24, 24)) for _ in range(4000))
    for expert, expected in enumerate(probs.tolist()):
        deviation = math.sqrt(4000 * expected * (1 - expected))  # six of them: 2 draws in 10^9 are further off
        assert counts[expert] == pytest.approx(4000 * expected, abs=6 * deviation)
    assert module.eval().choose(probs, (24, 24)) == 0


@pytest.mark.parametrize(
    ("grid", "allowed"),
    [((6, 6), {0, 1}), ((6, 7), {0, 1}), ((5, 5), {0}), ((4, 4), {0}), ((1, 17), {0}), ((12, 6), {0, 1, 2})],
)
def test_drawing_leaves_at_least_18_visual_tokens(grid: tuple[int, int], allowed: set[int]) -> None:
    module = boundary().train()
    # An expert of one percent is missing among 3000 draws with a probability of 10^-13.
    assert {module.choose(torch.tensor([0.01, 0.01, 0.98]), grid) for _ in range(3000)} == allowed


def test_language_loss_reaches_the_router_through_the_scaling() -> None:
    case = case_named("c01_g24_r012")
    model = load("c01_g24_r012").train()
    labels = torch.tensor(case.prompt_token_ids)
    labels[:17] = -100
    output = model(torch.tensor(case.prompt_token_ids), image_embeds=case.image_embeds, labels=labels)
    assert output.loss is not None and output.language_loss is not None and output.routing_loss is not None
    assert output.loss.item() == pytest.approx(output.language_loss.item() + 0.001 * output.routing_loss.item())
    output.language_loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_language_loss_equals_cross_entropy_of_the_text_rows() -> None:
    case = case_named("c04_g24_r222")
    model = load("c04_g24_r222")
    ids = case.prompt_token_ids
    output = model(ids, image_embeds=case.image_embeds, labels=torch.tensor([-100] * 18 + ids[18:]))
    # The 4 rows before the last one predict the last 4 ids, however many rows before them were pooled.
    expected = torch.nn.functional.cross_entropy(output.logits[-5:-1], torch.tensor(ids[-4:]))
    assert output.language_loss is not None
    assert output.language_loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_detached_router_input_keeps_the_routing_loss_out_of_the_decoder() -> None:
    case = case_named("c01_g24_r012")
    for detach in (False, True):
        model = load("c01_g24_r012").train()
        for module in model.boundaries:
            module.detach_router_input = detach
        routing_loss([model(case.prompt_token_ids, image_embeds=case.image_embeds).trace]).backward()
        assert (model.language_model.layers[0].mlp.down_proj.weight.grad is None) == detach
        assert model.boundaries[0].router.predictor.weight.grad is not None


def test_random_pooling_draws_uniformly_and_does_not_scale() -> None:
    config = BoundaryConfig(0, KERNELS)
    module = Boundary(config, PoolingConfig((config,), "random"), 8)
    rows = torch.rand(36 + 2, 8)
    counts: collections.Counter[int | None] = collections.Counter()
    for _ in range(300):
        packed, layout, record = module(rows, SampleLayout(38, 1, (6, 6), (37,)))
        counts[record.expert] += 1
        assert record.probs is None and layout.num_rows == len(packed)
        if record.expert == 0:
            assert torch.equal(packed, rows)
    assert min(counts.values()) > 100 - 6 * math.sqrt(300 * 1 / 3 * 2 / 3)
