"""What is frozen, LoRA, and new routers."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from dpn_rt.errors import ConfigError, TrainingError
from dpn_rt.model.reduction.pooling_config import BoundaryConfig, PoolingConfig
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.reference import EagerDpn
from dpn_rt.reference.add_routers import add_routers
from dpn_rt.training.options import LossOptions, RouterOptions
from dpn_rt.training.start import load_start
from dpn_rt.training.trained import add_lora, freeze, parameter_groups
from dpn_rt.training.trainer import trained_names
from tests.engine.models import MODEL, ROUTER_ID, VOCAB_SIZE, with_decoder
from tests.reference.test_batch import collate
from tests.reference.test_trainer_run import image_sample
from tests.skips import NO_PEFT
from tests.training.conftest import write_model


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_freeze() -> None:
    model = EagerDpn(MODEL)
    freeze(model, ["tower", "projector", "decoder"])
    assert tops(trained_names(model)) == {"boundaries"}
    freeze(model, ["decoder"])
    assert tops(trained_names(model)) == {"boundaries", "projector", "vision"}
    freeze(model, [])
    assert trained_names(model) == {name for name, _ in model.named_parameters()}


def test_groups_hold_every_trained_weight_once() -> None:
    model = EagerDpn(MODEL)
    freeze(model, ["tower"])
    groups = parameter_groups(model, 0.5, 0.1)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(p) for name, p in model.named_parameters() if not name.startswith("vision."))
    assert [(group.get("lr"), group["weight_decay"]) for group in groups] == [(0.5, 0.0), (None, 0.1), (None, 0.0)]
    assert all(parameter.dim() == 1 for parameter in groups[2]["params"])


@pytest.mark.parametrize("model_config", [MODEL, with_decoder(qkv_bias=True, o_bias=True)], ids=["plain", "biases"])
def test_lora_merged_equals_unmerged(model_config: object) -> None:
    pytest.importorskip("peft", reason=NO_PEFT)
    model = EagerDpn(model_config, torch.float64).eval()
    before = copy.deepcopy(model.state_dict())
    merge = add_lora(model, 4, ["tower"])
    names = trained_names(model)
    assert tops(names) == {"boundaries", "projector", "language_model"}
    assert {name for name in names if name.startswith("language_model")} == {n for n in names if ".lora_" in n}
    assert len([name for name in names if ".lora_A." in name]) == 7 * MODEL.decoder.num_layers
    batch = collate([image_sample(9), image_sample(12)])
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1, 0.0), lr=0.1)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    unmerged = model(**batch)
    merge()
    assert model.state_dict().keys() == before.keys()
    merged = model(**batch)
    for one, other in zip(merged.logits, unmerged.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("q_proj" in name for name in changed) and "lm_head.weight" not in changed
    assert not any("norm" in name for name in changed if name.startswith("language_model"))


def test_lora_needs_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(TrainingError, match=r"--lora 4 needs the package peft: .*pip install .*\[train\]"):
        add_lora(EagerDpn(MODEL), 4, [])


@pytest.mark.parametrize("tied", [False, True])
def test_a_router_token_gets_the_mean_of_all_embeddings(tied: bool) -> None:
    config = dataclasses.replace(with_decoder(tie_word_embeddings=tied), reduction=NoReduction())
    model = EagerDpn(config).eval()
    table = model.language_model.embed_tokens.weight.detach().clone()
    add_routers(model, MODEL.reduction, VOCAB_SIZE, is_new_token=True)
    grown = model.language_model.embed_tokens.weight
    assert torch.equal(grown[:-1], table) and len(grown) == VOCAB_SIZE + 1 == model.config.decoder.vocab_size
    torch.testing.assert_close(grown[-1], table.mean(dim=0))
    assert (model.lm_head.weight is grown) == tied and model.lm_head.weight.shape == grown.shape
    sample = image_sample(9)
    sample["input_ids"][sample["input_ids"] == ROUTER_ID] = VOCAB_SIZE
    assert model(**sample).trace.experts != (None, None, None)
    with pytest.raises(ConfigError, match="the model has boundaries: adaptive pooling, expected a dense model"):
        add_routers(model, MODEL.reduction, VOCAB_SIZE, is_new_token=True)


def test_a_tokenizer_without_a_router_token_gets_one(dense: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "dense"
    checkpoint.mkdir()
    for file in dense.iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    settings = json.loads((checkpoint / "tokenizer.json").read_text())
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] != "<ROUTER>"]
    del settings["model"]["vocab"]["<ROUTER>"]
    (checkpoint / "tokenizer.json").write_text(json.dumps(settings))
    (tmp_path / "files").mkdir()
    start = load_start(checkpoint, None, RouterOptions(), LossOptions(), tmp_path / "files")
    token_id = start.model.config.prompt.router_token_id
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "files" / "tokenizer.json"))
    assert tokenizer.token_to_id("<ROUTER>") == token_id and start.is_new
    table = start.model.language_model.embed_tokens.weight
    torch.testing.assert_close(
        table[token_id], EagerDpn.from_checkpoint(dense).language_model.embed_tokens.weight.mean(0)
    )
    start.model.save_checkpoint(tmp_path / "saved", start.files)
    again = EagerDpn.from_checkpoint(tmp_path / "saved")
    assert again.config.prompt.router_token_id == token_id


def test_a_known_router_token_keeps_its_embedding(dense: Path, tmp_path: Path) -> None:
    start = load_start(dense, None, RouterOptions(), LossOptions(), tmp_path)
    before = EagerDpn.from_checkpoint(dense)
    assert torch.equal(start.model.language_model.embed_tokens.weight, before.language_model.embed_tokens.weight)
    assert torch.equal(start.model.lm_head.weight, before.lm_head.weight)


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        (PoolingConfig((BoundaryConfig(1, ((2, 2),)),), "static"), "static pooling has no routers to train"),
        (PoolingConfig((BoundaryConfig(1, ((1, 1), (2, 2))),), "random"), "random pooling has no routers to train"),
        (PoolingConfig((BoundaryConfig(1, ((1, 1), (2, 2))),)), "its routers read the last row of a prompt"),
    ],
)
def test_reductions_that_cannot_be_trained(pooling: PoolingConfig, message: str, tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "model", pooling)
    (tmp_path / "files").mkdir()
    with pytest.raises(TrainingError, match=message):
        load_start(checkpoint, None, RouterOptions(), LossOptions(), tmp_path / "files")


def test_a_checkpoint_without_a_tokenizer_is_refused(dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "files").mkdir()
    with pytest.raises(TrainingError, match="model: has no tokenizer, expected one"):
        load_start(tmp_path / "model", None, RouterOptions(), LossOptions(), tmp_path / "files")


def test_a_checkpoint_without_a_tower_is_refused(dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "model")
    (tmp_path / "files").mkdir()
    stored = load_file(dense / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if "vision_tower" not in name}
    save_file(kept, tmp_path / "model" / "model.safetensors")
    notes: list[str] = []
    with pytest.raises(TrainingError, match=r"model: has no image processor or vision tower \(--vision-tower\)"):
        load_start(tmp_path / "model", None, RouterOptions(), LossOptions(), tmp_path / "files", notes.append)
    assert any("no weights of the vision tower" in note for note in notes)


def test_default_layers_divide_the_decoder() -> None:
    assert [RouterOptions().pooling(layers).layers for layers in (32, 40, 28, 8)] == [
        (7, 15, 23),
        (9, 19, 29),
        (6, 13, 20),
        (1, 3, 5),
    ]
    with pytest.raises(TrainingError, match="a decoder of 3 layers has no default, expected --pooling-layers"):
        RouterOptions().pooling(3)
