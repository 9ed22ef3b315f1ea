"""What Hugging Face's Trainer does with a model, access by access; `test_trainer_run.py` lets it run."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers.utils.generic import can_return_loss, find_labels

from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineDir, EngineSource, write_engine
from dpn_rt.reference import EagerDpn
from tests.golden_cases import case_named

CASE = case_named("c06_g12_r120")


@pytest.fixture
def model() -> EagerDpn:
    return EagerDpn.from_weights(CASE.config, CASE.canonical_weights().items())


def sample(model: EagerDpn) -> dict[str, torch.Tensor]:
    vocab = model.config.decoder.vocab_size
    return {"input_ids": torch.randint(3, vocab, (12,)), "labels": torch.randint(3, vocab, (12,))}


def test_trainer_sets_attributes_of_the_configuration(model: EagerDpn) -> None:
    before = model.config.to_dict()
    assert getattr(model, "config", None) is not None
    model.config.use_cache = False  # Trainer.__init__
    assert model.config.use_cache is False
    model.config.use_cache = True
    model.config.pad_token_id = 0  # its alignment of special tokens
    assert (model.config.use_cache, model.config.pad_token_id) == (True, 0)
    assert getattr(model.config, "problem_type", None) is None
    assert getattr(model.config, "keys_to_ignore_at_inference", ["cache"]) == ["cache"]
    assert getattr(model.config, "is_encoder_decoder", False) is False
    assert model.config.to_dict() == {**before, "use_cache": True, "pad_token_id": 0}  # its callbacks for loggers
    assert json.loads(model.config.to_json_string()) == model.config.to_dict()
    del model.config.use_cache
    assert not hasattr(model.config, "use_cache")


def test_trainer_aligns_special_tokens_with_a_tokenizer(model: EagerDpn) -> None:
    config = model.config.get_text_config(decoder=True)
    assert config is model.config
    assert (config.bos_token_id, config.eos_token_id) == (
        CASE.config.prompt.bos_token_id,
        list(CASE.config.prompt.eos_token_ids),
    )
    config.pad_token_id = 5
    assert model.config.pad_token_id == 5 and getattr(model, "generation_config", None) is None


def test_the_models_own_fields_stay_frozen(model: EagerDpn) -> None:
    for name in [field.name for field in dataclasses.fields(ModelConfig)]:
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"cannot assign to field '{name}'"):
            setattr(model.config, name, None)
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(model.config, name)


def test_the_configuration_is_still_that_of_an_engine(model: EagerDpn, tmp_path: Path) -> None:
    model.config.use_cache = False
    assert isinstance(model.config, ModelConfig)
    assert model.config == CASE.config and CASE.config == model.config
    assert hash(model.config) == hash(dataclasses.replace(model.config))
    assert model.config != dataclasses.replace(CASE.config, dtype="bfloat16")
    assert dataclasses.replace(model.config, dtype="bfloat16") == dataclasses.replace(CASE.config, dtype="bfloat16")
    for copied in (copy.copy(model.config), copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert copied == CASE.config
    assert copy.deepcopy(model).config == CASE.config
    write_engine(tmp_path / "e", model.config, EngineSource("0" * 64, "synthetic"), model.canonical_weights())
    assert EngineDir.open(tmp_path / "e").model == CASE.config


def test_a_training_step_as_trainer_makes_it(model: EagerDpn) -> None:
    assert find_labels(type(model)) == ["labels"] and not can_return_loss(type(model))
    assert not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    model.train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, given = [], sample(model)
    for _ in range(5):
        outputs = model(**given)
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]  # Trainer.compute_loss
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        losses.append(loss.detach().item())
    assert losses[-1] < losses[0]


def test_an_evaluation_step_as_trainer_makes_it(model: EagerDpn) -> None:
    given = sample(model)
    with torch.no_grad():
        outputs = model.eval()(**given)
        assert [tensor.shape for tensor in outputs[1:]] == [(12, model.config.decoder.vocab_size)]
        del given["labels"]
        outputs = model(**given)
    assert torch.equal(outputs[0], outputs.logits) and outputs[1:] == ()
    with pytest.raises(IndexError):
        outputs[1]
