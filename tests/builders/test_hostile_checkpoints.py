"""Files of a checkpoint that would make a build wait, take all memory or run code end in an error that names them."""

from __future__ import annotations

import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpn_rt.builders.checkpoint import CheckpointFiles
from dpn_rt.builders.clip_config import clip_values_from_shapes
from dpn_rt.builders.native import build_engine
from dpn_rt.builders.shards import TensorInfo, open_shard
from dpn_rt.builders.tokenizer_files import read_tokenizer
from dpn_rt.errors import CheckpointError, ConfigError, DpnError
from tests.builders.checkpoints import OriginalCheckpoint
from tests.builders.refusals import message_of, message_of_path
from tests.tiny_tokenizer import make_tokenizer

OPTIONAL = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("model.safetensors.index.json", "quantize_config.json"),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, which each test changes and restores."""
    path = tmp_path_factory.mktemp("checkpoint")
    tokenizer, model = make_tokenizer(path), OriginalCheckpoint()
    model.config |= {"vocab_size": tokenizer.vocab_size, "router_token_id": tokenizer.router_id}
    return model.fill().write(path)


def message_with(checkpoint: Path, tmp_path: Path, name: str, make: Callable[[Path], object]) -> str:
    """The error of a build with another thing under this name."""
    file, aside = checkpoint / name, checkpoint / f"{name}.aside"
    if file.exists():
        file.rename(aside)
    try:
        make(file)
        with pytest.raises(DpnError) as info:
            build_engine(checkpoint, tmp_path / "engine")
    finally:
        file.unlink()
        if aside.exists():
            aside.rename(file)
    assert not list(tmp_path.iterdir()) and len(str(info.value)) < 2000
    return str(info.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", *OPTIONAL])
def test_pipes_devices_and_links_to_nothing(checkpoint: Path, tmp_path: Path, name: str) -> None:
    if name == "tokenizer.model":  # it is read where there is no tokenizer.json
        (checkpoint / "tokenizer.json").rename(checkpoint / "moved")
    try:
        message = message_with(checkpoint, tmp_path, name, os.mkfifo)
        assert name in message and "a pipe, expected a regular file" in message
        message = message_with(checkpoint, tmp_path, name, lambda file: file.symlink_to("/dev/zero"))
        assert name in message and "a device, expected a regular file" in message
        message = message_with(checkpoint, tmp_path, name, lambda file: file.symlink_to("nowhere"))
        assert name in message and "a link to nowhere, which does not exist" in message
    finally:
        if name == "tokenizer.model":
            (checkpoint / "moved").rename(checkpoint / "tokenizer.json")


def test_a_pipe_as_pickle(tmp_path: Path) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "pytorch_model.bin")
    assert "pytorch_model.bin: a pipe, expected a regular file" in message_of_path(path, tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "added_tokens.json", "generation_config.json"]
)
def test_json_that_is_deep_large_or_long(checkpoint: Path, tmp_path: Path, name: str) -> None:
    def message(make: Callable[[Path], object]) -> str:
        return message_with(checkpoint, tmp_path, name, make)

    assert "nested more than 64 deep" in message(lambda file: file.write_text('{"a":' * 100_000))
    assert "a number of 5000 digits" in message(lambda file: file.write_text(f'{{"a": {"9" * 5000}}}'))
    assert "expected text in UTF-8" in message(lambda file: file.write_bytes('{"a": 1}'.encode("utf-16")))

    def large(file: Path) -> None:
        with file.open("wb") as opened:
            opened.truncate(1 << 40)

    assert "1,099,511,627,776 bytes, expected at most 16,777,216" in message(large)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"])
@pytest.mark.parametrize("value", [10**9, 10**30, -1, 0, True, 4.0, "4"])
def test_sizes(tmp_path: Path, key: str, value: object) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.config[key] = value
    message = message_of(checkpoint, tmp_path, ConfigError)
    assert str(value) in message and len(message) < 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a finite number of at most"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: expected a finite number of at most"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be positive, got 0"),
        ({"rope_theta": -1.0}, "rope.theta must be positive, got -1.0"),
        ({"rope_theta": 0}, "rope.theta must be positive, got 0"),
        ({"rope_theta": True}, "rope_theta: expected float, got True"),
        ({"eos_token_id": [2, 500]}, "eos_token_ids 500 is outside the vocabulary of 120"),
        ({"eos_token_id": list(range(300))}, "eos_token_id: 300 token ids, expected at most 256"),
        ({"bos_token_id": 120}, "bos_token_id 120 is outside the vocabulary of 120"),
        ({"hidden_size": "x" * 10**6}, "hidden_size: expected int, got 'xxx"),
        ({"vision_config": {"num_hidden_layers": 10**9}}, "vision num_layers must be at most 1024, got 999999999"),
        ({"vision_config": {"image_size": 10**9}}, "vision image_size must be at most 4096, got 1000000000"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 9999, "long_factor": [1.0]}},
            "rope_scaling.rope_type: expected one of default, linear, dynamic, yarn, llama3; got 'longrope'",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": [1.0] * 9999}}, "rope scaling {"),
        ({"model_type": "l" * 10**6}, "model_type: expected one of llava_llama, llava, llava_mistral"),
        ({"is_multipath_encoder": True, "input_image_size": 10**90}, "input_image_size: expected a finite number"),
    ],
)
def test_other_numbers(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    checkpoint = OriginalCheckpoint().fill()
    nested = {**checkpoint.config["vision_config"], **changes.get("vision_config", {})}
    checkpoint.config.update(changes, vision_config=nested)
    found = message_of(checkpoint, tmp_path, ConfigError)
    assert message in found and len(found) < 1000


def test_pooling_numbers(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    first = checkpoint.pooling["pooling_layers"][0]
    first.update(kernel_size=[[1, 1], [1, 2], [10**12, 1]], stride=None)
    assert "kernels[2][0] must be at most 4096" in message_of(checkpoint, tmp_path, ConfigError)
    first.update(kernel_size=[[1, 1]] * 300)
    assert "kernels must be at most 256 items, got 300" in message_of(checkpoint, tmp_path, ConfigError)
    checkpoint.pooling["pooling_layers"] = [first] * 300
    assert "pooling_layers: 300 layers, expected at most 256" in message_of(checkpoint, tmp_path, ConfigError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": [float("nan")] * 3}, "image_mean is [nan, nan, nan], expected numbers from"),
        ({"image_mean": [1e300] * 3}, "image_mean is [1e+300"),
        ({"image_std": [0, 0, 0]}, "image_std is [0, 0, 0], expected numbers from"),
        ({"image_std": [True] * 3}, "image_std is [True, True, True]"),
        ({"image_mean": [None, 0.4, 0.4]}, "image_mean is [None, 0.4, 0.4]"),
        ({"rescale_factor": float("inf")}, "rescale_factor is inf, expected numbers from"),
        ({"size": {"shortest_edge": 10**6}}, "size is {'shortest_edge': 1000000}, expected whole numbers from 1 to"),
        ({"size": {"shortest_edge": 28.0}}, "size is {'shortest_edge': 28.0}, expected whole numbers"),
        ({"pad_size": {"height": -1}}, "pad_size is {'height': -1}"),
    ],
)
def test_image_settings(checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
        **changes,
    }
    name = "preprocessor_config.json"
    found = message_with(checkpoint, tmp_path, name, lambda file: file.write_text(json.dumps(settings)))
    assert f"{name}: {message}" in found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", {"<x>": "a"}, "the token '<x>' has the id 'a', expected a whole number"),
        ("added_tokens.json", {"<x>": None}, "has the id None, expected a whole number"),
        ("added_tokens.json", {"<x>": -1}, "has the id -1, expected a whole number"),
        ("added_tokens.json", {"<x>": float("inf")}, "has the id inf, expected a whole number"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"500": 3}}, "expected an object with a content"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"500": {"content": 5}}},
            "expected an object with a content",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "has the id 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "has the id '999"),
    ],
)
def test_token_lists(tmp_path: Path, name: str, content: dict[str, Any], message: str) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as info:
        read_tokenizer(tmp_path, lambda _: None)
    assert str(tmp_path / name) in str(info.value) and message in str(info.value)


def test_many_added_tokens_are_added_at_once(tmp_path: Path) -> None:
    size = make_tokenizer(tmp_path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({f"<x{i}>": size + i for i in range(20_000)}))
    found = read_tokenizer(tmp_path, lambda _: None)
    assert found is not None and found.size == size + 20_000


class Calls:
    """Is unpickled by a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_that_ask_for_memory(tmp_path: Path, legacy: bool) -> None:
    """`bytearray` is among the functions that torch's safe loading calls."""
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": Calls(bytearray, 10**12)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        CheckpointError, match=r"refused: the pickle holds more than tensors \('(?:__builtin__|builtins) bytearray'\)"
    ):
        open_shard(file).list_tensors()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3).to_sparse(),
        torch.zeros(3, device="meta"),
    ],
    ids=["sparse", "meta"],
)
def test_tensors_whose_values_are_elsewhere(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="refused: the pickle holds more than tensors"):
        open_shard(tmp_path / "pytorch_model.bin").list_tensors()


def test_names_that_are_no_texts(tmp_path: Path) -> None:
    torch.save({3: torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors"):
        open_shard(tmp_path / "pytorch_model.bin").list_tensors()


def test_archives_that_are_larger_inside(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1)}, file)
    entries = {entry.filename: zipfile.ZipFile(file).read(entry) for entry in zipfile.ZipFile(file).infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data + bytes(1 << 20))
    with pytest.raises(CheckpointError, match="is compressed, expected it as torch.save writes it"):
        open_shard(file).list_tensors()
    content = bytearray(file.read_bytes())
    last_entry = content.rindex(b"PK\x01\x02")  # of the list of files
    content[last_entry : last_entry + 4] = random.randbytes(4)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or damaged: not a file that torch.save wrote"):
        open_shard(file).list_tensors()


@pytest.mark.parametrize("total", ["99999999999", "9" * 200])
def test_numbers_in_names_of_shards(tmp_path: Path, total: str) -> None:
    (tmp_path / f"model-00001-of-{total}.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"one of {total} shards, expected at most 10000"):
        CheckpointFiles(tmp_path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", ".", ""])
def test_indexes_that_leave_the_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=f"shards must lie in the checkpoint directory, got '{name}'"):
        CheckpointFiles(tmp_path)


def test_indexes_of_what_is_missing(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for name in ("a\0b", "x" * 5000):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="1 of 1 shards are missing"):
            CheckpointFiles(tmp_path)
    index.write_text(json.dumps({"weight_map": {f"a{i}": f"x{i}.safetensors" for i in range(9999)}}))
    with pytest.raises(CheckpointError, match="9999 of 9999 shards are missing: .* and 9,959 more") as info:
        CheckpointFiles(tmp_path)
    assert len(str(info.value)) < 2000


def test_towers_with_numbers_in_their_names() -> None:
    sizes = {"embeddings.patch_embedding.weight": (8, 3, 2, 2), "embeddings.position_embedding.weight": (0, 8)}
    sizes |= {"encoder.layers.0.mlp.fc1.weight": (4, 8), f"encoder.layers.{'9' * 5000}.x": (1,)}
    tensors = {name: TensorInfo(shape, "float32") for name, shape in sizes.items()}
    values = clip_values_from_shapes(tensors, "", lambda _: None)
    assert (values["num_hidden_layers"], values["image_size"]) == (1, 0)


def test_a_tower_directory_with_a_name_that_none_can_have(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.config["mm_vision_tower"] = "x" * 5000
    build_engine(checkpoint.write(tmp_path / "c"), tmp_path / "e")
