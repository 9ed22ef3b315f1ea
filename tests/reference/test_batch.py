"""A batch equals its samples, one by one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from dpn_rt.errors import ImageError, RequestError
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.reference import EagerBatchOutput, EagerDpn, EagerOutput, routing_loss
from dpn_rt.reference.training import ROUTING_LOSS_WEIGHT
from tests.engine.models import MODEL
from tests.reference.test_trainer_run import Sample, image_sample, make_trainer, parameters, text_sample

DENSE = dataclasses.replace(MODEL, reduction=NoReduction())


def collate(samples: list[Sample]) -> dict[str, Any]:
    longest = max(len(sample["input_ids"]) for sample in samples)

    def padded(name: str, value: int) -> torch.Tensor:
        rows = [sample[name] for sample in samples]
        return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=value) for row in rows])

    mask = torch.stack([torch.arange(longest) < len(sample["input_ids"]) for sample in samples]).long()
    pictures = [sample.get("pixel_values") for sample in samples]
    return {
        "input_ids": padded("input_ids", 5),
        "labels": padded("labels", -100),
        "attention_mask": mask,
        "pixel_values": pictures,
    }


def make(config: Any, dtype: torch.dtype | None = None) -> EagerDpn:
    model = EagerDpn(config, dtype)
    for boundary in model.boundaries:
        boundary.min_drawn_visual_tokens = 1  # the published 18 would leave one expert for these small images
    return model


def samples() -> list[Sample]:
    found = [image_sample(9), text_sample(7), image_sample(14), image_sample(10)]
    for index, sample in enumerate(found):
        sample["labels"][: 2 + index] = -100  # so that samples differ in the number of answer tokens
    return found


def gradients(model: EagerDpn) -> Sample:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def by_hand(model: EagerDpn, given: list[Sample]) -> tuple[torch.Tensor, list[EagerOutput]]:
    """The loss of a batch from samples one by one: their language losses weighted by answer tokens."""
    outputs = [model(**sample) for sample in given]
    counts = torch.tensor([int((sample["labels"][1:] != -100).sum()) for sample in given])
    language = sum(output.language_loss * count for output, count in zip(outputs, counts, strict=True)) / counts.sum()
    return language + ROUTING_LOSS_WEIGHT * routing_loss([output.trace for output in outputs]), outputs


@pytest.mark.parametrize("config", [MODEL, DENSE], ids=["adaptive", "dense"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_equals_single_samples_in_float64(config: Any, training: bool) -> None:
    model, given = make(config, torch.float64).train(training), samples()
    state = torch.get_rng_state()
    expected, outputs = by_hand(model, given)
    expected.backward()
    wanted = gradients(model)
    torch.set_rng_state(state)  # the batch draws its routes in the order of its samples
    batch = model(**collate(given))
    assert isinstance(batch, EagerBatchOutput)
    assert [trace.experts for trace in batch.traces] == [output.trace.experts for output in outputs]
    for logits, output in zip(batch.logits, outputs, strict=True):
        torch.testing.assert_close(logits, output.logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(batch.loss, expected.to(batch.loss.dtype), rtol=1e-6, atol=1e-7)
    batch.loss.backward()
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_every_sample_draws_its_own_route() -> None:
    model, sample = make(MODEL).train(), image_sample(9)
    torch.nn.init.zeros_(model.boundaries[0].router.predictor.weight)  # its experts are as probable as each other
    first = [trace.experts[0] for trace in model(**collate([sample] * 48)).traces]
    assert set(first) == set(range(MODEL.reduction.boundaries[0].num_experts))  # 1e-8 that one is not drawn


def test_the_hinge_of_the_routing_loss_comes_after_the_mean_over_samples() -> None:
    model = EagerDpn(MODEL).eval()
    batch = model(**collate(samples()))
    assert batch.routing_loss == routing_loss(batch.traces)
    model.routing_hinge_target = 100.0
    assert model(**collate(samples())).routing_loss > 90


def test_padding_and_a_batch_of_one() -> None:
    model, given = EagerDpn(MODEL).eval(), samples()
    alone = collate(given[:1])
    assert isinstance(model(**alone), EagerBatchOutput)
    wide = {name: torch.nn.functional.pad(alone[name], (0, 9), value=value) for name, value in PADDING.items()}
    padded = model(**wide, pixel_values=alone["pixel_values"])
    torch.testing.assert_close(padded.logits[0], model(**alone).logits[0])
    assert padded.loss == model(**alone).loss
    assert isinstance(model(**{k: v[None] for k, v in given[0].items()}), EagerOutput)


PADDING = {"input_ids": 0, "labels": -100, "attention_mask": 0}


def test_pixels_in_one_tensor_and_no_mask() -> None:
    model, given = EagerDpn(MODEL).eval(), [image_sample(9), image_sample(9)]
    stacked = {name: torch.stack([sample[name] for sample in given]) for name in given[0]}
    torch.testing.assert_close(model(**stacked).loss, model(**collate(given)).loss)


def test_parts_of_a_step_add_up_to_it() -> None:
    model, given = EagerDpn(DENSE, torch.float64).eval(), samples()
    whole = collate(given)
    total = int((whole["labels"][:, 1:] != -100).sum())
    expected = model(**whole).loss
    halves = [model(**collate(part), num_items_in_batch=total).loss for part in (given[:1], given[1:])]
    torch.testing.assert_close(sum(halves), expected, rtol=1e-6, atol=1e-7)
    alone = [model(**sample, num_items_in_batch=torch.tensor(total)).loss for sample in given]
    torch.testing.assert_close(sum(alone), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("batch", "accumulated"), [(4, 1), (2, 2), (1, 4)])
def test_trainer_makes_the_same_step_of_any_batches(batch: int, accumulated: int, tmp_path: Path) -> None:
    given = samples()
    model = EagerDpn(DENSE)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    trainer = make_trainer(model, tmp_path, given, max_steps=1, optim="sgd", max_grad_norm=0.0, **options)
    trainer.data_collator = collate
    trainer.train()
    expected = EagerDpn(DENSE)
    expected.load_state_dict(start)
    expected(**collate(given)).loss.backward()
    torch.optim.SGD(expected.parameters(), lr=1e-2).step()
    found = parameters(model)
    for name, value in parameters(expected).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_padded_logits_are_what_trainer_evaluates() -> None:
    model = EagerDpn(MODEL).eval()
    output = model(**collate(samples()))
    loss, logits = output[:2]
    longest = max(len(rows) for rows in output.logits)
    assert loss is output.loss and logits.shape[:2] == (4, longest)
    for index, rows in enumerate(output.logits):
        assert torch.equal(logits[index, : len(rows)], rows) and not logits[index, len(rows) :].any()


def test_wrong_batches_are_refused() -> None:
    model, given = EagerDpn(MODEL).eval(), collate(samples())
    left = given["attention_mask"].flip(1)
    for changed, message in (
        ({"attention_mask": left}, r"attention_mask\[0\]: expected padding on the right"),
        ({"attention_mask": left[:, 1:]}, r"attention_mask: expected shape \[4, 14\], as input_ids, got \[4, 13\]"),
        ({"labels": given["labels"][:2]}, r"labels: expected shape \[4, 14\], as input_ids, got \[2, 14\]"),
        ({"pixel_values": given["pixel_values"][:3]}, "pixel_values: expected an entry per sample, 4, got 3"),
        ({"pixel_values": [None] * 4}, "sample 0: the prompt has the image placeholder"),
        ({"route": [0, 0, 0]}, "route: got a batch, expected a single sample"),
        ({"input_ids": given["input_ids"].tolist()}, "input_ids: expected a tensor with an attention_mask, got list"),
        ({"input_ids": given["input_ids"][0]}, r"input_ids: expected a batch \[num_samples, num_ids\]"),
    ):
        with pytest.raises((RequestError, ImageError), match=message):
            model(**{**given, **changed})
    with pytest.raises(ImageError, match="pixel_values: got a list, expected it for a batch"):
        model(given["input_ids"][0], pixel_values=given["pixel_values"])
