"""Every fault of a checkpoint has a message that names it, and no engine is left."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpn_rt.builders.native import build_engine
from dpn_rt.errors import ConfigError
from tests.builders.checkpoints import TOWER, OriginalCheckpoint, write_tower
from tests.builders.refusals import message_of, message_of_path

# Weights


def test_all_wrong_weights_are_named_together(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    weights = checkpoint.weights
    missing = ["lm_head.weight", "model.layers.2.pooling_router.mlp1.1.weight", f"{TOWER}pre_layrnorm.bias"]
    for name in missing:
        del weights[name]
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(47, 32)
    weights["model.mm_projector.0.weight"] = torch.zeros(32, 23)
    weights["model.layers.1.mlp.down_proj.weight"] = torch.zeros(32, 48, dtype=torch.int8)
    weights["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(32)
    weights["model.layers.4.mlp.up_proj.weight"] = torch.zeros(48, 32)
    weights["model.mm_projector.4.weight"] = torch.zeros(32, 32)
    message = message_of(checkpoint, tmp_path)
    for name in missing:
        assert name in message.partition("wrong shape")[0]
    assert "model.layers.1.mlp.up_proj.weight (expected [48, 32], got [47, 32])" in message
    assert "model.mm_projector.0.weight (expected [32, 24], got [32, 23])" in message
    assert "model.layers.1.mlp.down_proj.weight (expected a float dtype, got int8)" in message
    for name in ("layers.1.self_attn.q_proj.bias", "layers.4.mlp.up_proj.weight", "mm_projector.4.weight"):
        assert name in message.partition("unexpected")[2]
    assert "inv_freq" not in message
    assert "post_layernorm" not in message


def test_adaptive_pooling_needs_its_router(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.weights = {name: t for name, t in checkpoint.weights.items() if "pooling_router" not in name}
    message = message_of(checkpoint, tmp_path)
    assert message.count("pooling_router") == 8


def test_router_without_pooling_is_not_silently_dropped(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    del checkpoint.config["pooling"]
    message = message_of(checkpoint, tmp_path)
    assert "unexpected" in message
    assert message.count("pooling_router") == 8


def test_router_at_another_layer(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.pooling["pooling_layers"][1]["index"] = 1
    message = message_of(checkpoint, tmp_path)
    assert "model.layers.1.pooling_router.predictor.weight" in message.partition("unexpected")[0]
    assert "model.layers.2.pooling_router.predictor.weight" in message.partition("unexpected")[2]


@pytest.mark.parametrize("pooling_type", ["static", "random"])
def test_routers_of_a_trained_model_may_stay_for_an_ablation(tmp_path: Path, pooling_type: str) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.pooling["pooling_type"] = pooling_type
    if pooling_type == "static":
        for layer in checkpoint.pooling["pooling_layers"]:
            layer.update(kernel_size=[2, 2], stride=[2, 2])
    engine = build_engine(checkpoint.write(tmp_path / "c"), tmp_path / "e")
    assert not any("router" in name for name in engine.load_weights())


def test_conv_experts_for_a_model_that_pools_by_maximum(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint()
    checkpoint.pooling["pooling_function"] = "conv"
    checkpoint.fill()
    checkpoint.pooling["pooling_function"] = "max"
    assert "model.layers.0.experts.0.weight" in message_of(checkpoint, tmp_path).partition("unexpected")[2]


def test_expert_count_differs_from_the_predictor(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    for layer in checkpoint.pooling["pooling_layers"]:
        layer.update(kernel_size=[[1, 1], [2, 2]], stride=[[1, 1], [2, 2]])
    assert "predictor.weight (expected [2, 8], got [3, 8])" in message_of(checkpoint, tmp_path)


def test_vocabulary_size_differs(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.config["vocab_size"] = 121
    assert "model.embed_tokens.weight (expected [121, 32], got [120, 32])" in message_of(checkpoint, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_weights(tmp_path: Path, value: float) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.weights["model.layers.1.self_attn.v_proj.weight"][3, 4] = value
    message = message_of(checkpoint, tmp_path)
    assert "model.layers.1.self_attn.v_proj.weight" in message
    assert "holds infinite values or NaN" in message


def test_values_beyond_float16(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.weights["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e5
    path = checkpoint.write(tmp_path / "c")
    message = message_of_path(path, tmp_path, dtype="float16")
    assert (
        message == "model.layers.1.mlp.down_proj.weight: values up to 1e+05 do not fit float16: choose another --dtype"
    )
    build_engine(path, tmp_path / "e", dtype="bfloat16")


def test_what_is_none_of_ours_is_noted(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.weights["model.image_newline"] = torch.zeros(32)
    notes: list[str] = []
    build_engine(checkpoint.write(tmp_path / "c"), tmp_path / "e", note=notes.append)
    assert "1 weights are not part of the model and are left out: model.image_newline" in notes


def test_two_towers(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.weights["model.slow_tower.embeddings.class_embedding"] = torch.zeros(24)
    assert "more than one vision tower" in message_of(checkpoint, tmp_path)


# Files


def cut(file: Path, keep: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_shards_are_named(tmp_path: Path, suffix: str, keep: float) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c", suffix=suffix, shards=2)
    shard = sorted(path.glob(f"*-00002-of-*.{suffix}"))[0]
    cut(shard, keep)
    message = message_of_path(path, tmp_path)
    assert str(shard) in message
    assert "truncated or damaged" in message or "the file is empty" in message


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("index", [False, True])
def test_missing_shards_are_named(tmp_path: Path, suffix: str, index: bool) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c", suffix=suffix, shards=4, index=index)
    gone = [file for file in sorted(path.glob("*-of-*")) if "-00001-" in file.name or "-00003-" in file.name]
    for file in gone:
        file.unlink()
    message = message_of_path(path, tmp_path)
    assert f"2 of 4 shards are missing: {gone[0].name}, {gone[1].name}" in message


class RunsCode:
    """Unpickling it would make a file."""

    def __init__(self, path: Path, with_shell: bool = False) -> None:
        self.path = path
        self.with_shell = with_shell

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return (os.system, (f"touch '{self.path}'",)) if self.with_shell else (open, (str(self.path), "w"))


@pytest.mark.parametrize("with_shell", [False, True])  # torch refuses some modules with other words
@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_that_would_run_code_is_refused(tmp_path: Path, legacy: bool, with_shell: bool) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c", suffix="bin")
    content = {"model.norm.weight": torch.zeros(3), "x": RunsCode(tmp_path / "ran", with_shell)}
    torch.save(content, path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    message = message_of_path(path, tmp_path)
    assert "refused: the pickle holds more than tensors" in message
    assert str(path / "pytorch_model.bin") in message
    assert not (tmp_path / "ran").exists()


def test_bare_pickle_is_refused(tmp_path: Path) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c", suffix="bin")
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    message_of_path(path, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_legacy_bin_is_read(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    path = checkpoint.write(tmp_path / "c", suffix="bin")
    torch.save(checkpoint.weights, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    build_engine(path, tmp_path / "e")


@pytest.mark.parametrize("content", [[1, 2], {"model.norm.weight": 3}, {"model": {"a": torch.zeros(1)}}])
def test_bin_that_is_no_state_dict(tmp_path: Path, content: object) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c", suffix="bin")
    torch.save(content, path / "pytorch_model.bin")
    assert "expected a dictionary of tensors" in message_of_path(path, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_files_that_are_not_what_their_name_says(tmp_path: Path, name: str) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "a Git LFS pointer, not the weights" in message_of_path(path, tmp_path)
    (path / name).write_bytes(io.BytesIO(b"<html>not found</html>" * 9).getvalue())
    assert "truncated or damaged" in message_of_path(path, tmp_path)


def test_index_that_does_not_fit_its_shards(tmp_path: Path) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c", shards=2, index=True)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    assert "model.layers.9.weight (model-00001-of-00002.safetensors)" in message_of_path(path, tmp_path)
    content["weight_map"]["x"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    assert "shards must lie in the checkpoint directory" in message_of_path(path, tmp_path)
    for broken in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(broken)
        assert str(index) in message_of_path(path, tmp_path)


def test_shards_of_two_checkpoints(tmp_path: Path) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c", shards=2)
    (path / "other.safetensors").write_bytes((path / "model-00001-of-00002.safetensors").read_bytes())
    assert "which shards belong together?" in message_of_path(path, tmp_path)
    (path / "model-00001-of-00002.safetensors").rename(path / "a.safetensors")
    (path / "model-00002-of-00002.safetensors").rename(path / "b.safetensors")
    assert "is in two shards: a.safetensors, other.safetensors" in message_of_path(path, tmp_path)


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    assert "not a directory" in message_of_path(tmp_path / "nowhere", tmp_path)
    path = tmp_path / "c"
    path.mkdir()
    assert "config.json: cannot be read: No such file" in message_of_path(path, tmp_path)
    (path / "config.json").write_text('{"a": ')
    assert "config.json: not JSON (truncated?)" in message_of_path(path, tmp_path)
    (path / "config.json").write_text("[]")
    assert "expected a JSON object, got list" in message_of_path(path, tmp_path)
    (path / "config.json").write_text("{}")
    assert "no weights: expected *.safetensors or pytorch_model*.bin" in message_of_path(path, tmp_path)


def test_adapters_are_not_left_out(tmp_path: Path) -> None:
    """Not even beside weights of their own, which would answer as the model without the adapter."""
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    (path / "adapter_config.json").write_text("{}")
    expected = "expected it to be merged into its base model (merge_and_unload), or not to be there"
    assert message_of_path(path, tmp_path) == f"{path}: holds a LoRA adapter (adapter_config.json), {expected}"
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "adapter_model.safetensors").write_bytes(b"x")
    assert message_of_path(alone, tmp_path) == f"{alone}: holds a LoRA adapter (adapter_model.safetensors), {expected}"


def test_vision_tower_directories(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.weights = {name: tensor for name, tensor in checkpoint.weights.items() if not name.startswith(TOWER)}
    path = checkpoint.write(tmp_path / "c")
    assert "not a directory" in message_of_path(path, tmp_path, vision_tower=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json: cannot be read" in message_of_path(path, tmp_path, vision_tower=tmp_path / "empty")
    narrow = {**checkpoint.config["vision_config"], "hidden_size": 12}
    write_tower(tmp_path / "narrow", narrow)
    message = message_of_path(path, tmp_path, ConfigError, vision_tower=tmp_path / "narrow")
    assert "mm_hidden_size is 24, the vision tower's hidden size 12" in message
    other = OriginalCheckpoint()
    other.config["vision_config"] = None
    assert "holds no weights of a CLIP or SigLIP vision tower" in message_of_path(
        path, tmp_path, vision_tower=other.fill().write(tmp_path / "other")
    )
