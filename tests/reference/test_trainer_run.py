"""Hugging Face's Trainer trains, saves, resumes and evaluates an `EagerDpn`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID, ModelConfig
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.reference import EagerDpn
from tests.engine.models import MODEL, ROUTER_ID, VOCAB_SIZE, with_decoder

Sample = dict[str, torch.Tensor]
MODELS = {
    "adaptive": MODEL,
    "dense": dataclasses.replace(MODEL, reduction=NoReduction()),
    "tied": with_decoder(tie_word_embeddings=True, qkv_bias=True, o_bias=True),
}


def image_sample(num_ids: int) -> Sample:
    ids, labels = torch.randint(3, ROUTER_ID, (2, num_ids))
    ids[2], labels[2], ids[-3] = IMAGE_PLACEHOLDER_ID, -100, ROUTER_ID
    assert MODEL.vision is not None
    side = MODEL.vision.image_size
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(3, side, side)}


def text_sample(num_ids: int) -> Sample:
    ids, labels = torch.randint(3, ROUTER_ID, (2, num_ids))
    return {"input_ids": ids, "labels": labels}


def make_trainer(model: EagerDpn, folder: Path, samples: list[Sample] | None = None, **options: Any) -> Trainer:
    samples = samples or [image_sample(9), text_sample(7), image_sample(12), image_sample(10)]
    defaults = {"max_steps": 2, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "save_steps": 1}
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{**defaults, "logging_steps": 1, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, **options},
    )
    return Trainer(model=model, args=arguments, train_dataset=samples, eval_dataset=samples)


def parameters(model: EagerDpn) -> Sample:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(actual: EagerDpn, expected: EagerDpn) -> None:
    wanted = parameters(expected)
    for name, parameter in parameters(actual).items():
        assert torch.equal(parameter, wanted[name]), name


def losses(trainer: Trainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.parametrize("name", MODELS)
def test_trains_saves_and_loads_again(name: str, tmp_path: Path) -> None:
    model = EagerDpn(MODELS[name])
    before = parameters(model)
    trainer = make_trainer(model, tmp_path / "run")
    result = trainer.train()
    assert torch.isfinite(losses(trainer)).all() and len(losses(trainer)) == result.global_step == 2
    after = parameters(model)
    unchanged = [key for key in before if torch.equal(before[key], after[key])]
    assert not [key for key in unchanged if key.startswith(("language_model", "lm_head", "projector"))]

    loaded = EagerDpn(MODELS[name])
    loaded.load_state_dict(load_file(tmp_path / "run/checkpoint-2/model.safetensors"))
    assert_same_weights(loaded, model)
    if MODELS[name].decoder.tie_word_embeddings:
        assert loaded.lm_head.weight is loaded.language_model.embed_tokens.weight
    model.save_checkpoint(tmp_path / "published")
    published = EagerDpn.from_checkpoint(tmp_path / "published")
    for key, weight in published.canonical_weights():
        assert torch.equal(weight, dict(loaded.canonical_weights())[key]), key


def test_resumes(tmp_path: Path) -> None:
    samples = [image_sample(9), text_sample(7), image_sample(12)]
    unbroken, resumed = EagerDpn(MODELS["tied"]), EagerDpn(MODELS["tied"])
    make_trainer(unbroken, tmp_path / "run", samples, max_steps=3).train()
    trainer = make_trainer(resumed, tmp_path / "again", samples, max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert trainer.state.global_step == 3
    assert_same_weights(resumed, unbroken)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1},
        {"report_to": ["tensorboard"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_its_options(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(EagerDpn(MODEL), tmp_path / "run", **options)
    trainer.train()
    assert torch.isfinite(losses(trainer)).all() and len(losses(trainer)) == 2


def test_evaluates_and_predicts(tmp_path: Path) -> None:
    trainer = make_trainer(EagerDpn(MODEL), tmp_path / "run")
    assert trainer.evaluate()["eval_loss"] > 0
    prediction = trainer.predict([image_sample(9), text_sample(7)])
    assert prediction.predictions.shape[1] == VOCAB_SIZE and prediction.label_ids.shape == (2, 9)


@pytest.mark.parametrize("config", [MODEL, MODELS["dense"]], ids=["adaptive", "dense"])
def test_recomputed_activations_give_the_same_gradients(config: ModelConfig) -> None:
    model, sample = EagerDpn(config).train(), image_sample(12)
    route = [2, 0, 1][: len(config.reduction.layers)]

    def gradients() -> Sample:
        model.zero_grad()
        model(**sample, route=route).loss.backward()
        return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}

    kept = gradients()
    model.activation_checkpointing_enable()
    again = gradients()
    assert kept.keys() == again.keys()
    for key, gradient in kept.items():
        torch.testing.assert_close(again[key], gradient)


def test_labels_of_another_length_are_refused() -> None:
    sample = text_sample(7)
    for shape in ([6], [2, 7], [7, 1]):
        with pytest.raises(ValueError, match=r"labels: expected shape \[7\], one per prompt id, got"):
            EagerDpn(MODEL)(sample["input_ids"], labels=torch.zeros(shape, dtype=torch.long))
