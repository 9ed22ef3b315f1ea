"""Quantised checkpoints to engines: the numbers that each format stands for."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpn_rt.builders.checkpoint import CheckpointFiles
from dpn_rt.builders.native import build_engine
from dpn_rt.builders.quantized.checkpoint import QuantizedCheckpoint, matrix_of
from dpn_rt.builders.quantized.formats import read_format
from tests.builders import quantized_checkpoints as written
from tests.builders.checkpoints import TOWER, OriginalCheckpoint, expected_weights, save_weights, write_tower
from tests.builders.quantized_checkpoints import SAMPLES, layers_of, put, quantize_layers, random_grid, wide_checkpoint

GROUPS = [32, 64, 128, -1]


def assert_stands_for(checkpoint: OriginalCheckpoint, dense: OriginalCheckpoint, tmp_path: Path) -> list[str]:
    notes: list[str] = []
    path = checkpoint.write(tmp_path / "checkpoint", shards=3)
    engine = build_engine(path, tmp_path / "engine", dtype="float32", quantize="none", note=notes.append)
    assert engine.model.quantize == "none"
    stored = engine.load_weights()
    expected = expected_weights(dense)
    assert stored.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(stored[name], weight), name
    return notes


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq(tmp_path: Path, group: int, symmetric: bool) -> None:
    checkpoint = wide_checkpoint()
    checkpoint.config["quantization_config"] = written.awq_config(group)
    modules = [*layers_of(checkpoint), "lm_head"]
    dense, _ = quantize_layers(
        checkpoint, modules, lambda *shape: random_grid(*shape, 4, group, symmetric=symmetric), written.awq
    )
    notes = assert_stands_for(checkpoint, dense, tmp_path)
    assert [note for note in notes if "published" in note] == [
        "15 weights are published in 4 bits (AWQ), the engine has them in float32"
    ]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("bits", "version"), [(4, 1), (4, 2), (8, 1), (8, 2)])
def test_gptq(tmp_path: Path, bits: int, group: int, version: int) -> None:
    """Zero points 0 and 15 among them, of which one is stored as the other in version 1."""
    checkpoint = wide_checkpoint()
    checkpoint.config["quantization_config"] = written.gptq_config(bits, group, version)
    dense, _ = quantize_layers(
        checkpoint,
        layers_of(checkpoint),
        lambda *shape: random_grid(*shape, bits, group, symmetric=False),
        lambda grid: written.gptq(grid, version=version),
    )
    assert_stands_for(checkpoint, dense, tmp_path)


@pytest.mark.parametrize("group", [*GROUPS, 96])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_compressed_tensors(tmp_path: Path, bits: int, group: int, symmetric: bool) -> None:
    """96 columns do not divide a row: its last group is shorter."""
    checkpoint = wide_checkpoint()
    named = None if group == -1 else group
    config = written.compressed_config("pack-quantized", bits, named, symmetric=symmetric)
    checkpoint.config["quantization_config"] = config
    dense, _ = quantize_layers(
        checkpoint,
        layers_of(checkpoint),
        lambda *shape: random_grid(*shape, bits, group, symmetric=symmetric, dtype=torch.bfloat16),
        written.packed,
    )
    assert_stands_for(checkpoint, dense, tmp_path)


def test_layers_that_the_package_wrote(tmp_path: Path) -> None:
    """Sizes that fill no word, zero points of every kind, one scale for a whole matrix."""
    tensors = load_file(SAMPLES / "layers.safetensors")
    names = sorted({name.partition(".")[0] for name in tensors})
    expected = {name: tensors.pop(f"{name}.expected") for name in names}
    tensors["int8_whole.weight"] = tensors["int8.weight"].clone()
    tensors["int8_whole.weight_scale"] = torch.tensor([0.25])
    expected["int8_whole"] = tensors["int8.weight"] * 0.25
    save_weights(tensors, tmp_path / "model.safetensors")
    config = written.compressed_config("mixed-precision", 4, 32)
    for number, (bits, group) in enumerate([(4, None), (8, 16), (8, None)]):
        more = written.compressed_config("", bits, group)["config_groups"]["group_0"]
        config["config_groups"][f"group_{number + 1}"] = more
    form = read_format(tmp_path, {"quantization_config": config})
    assert form is not None
    checkpoint = QuantizedCheckpoint(CheckpointFiles(tmp_path), form)
    assert set(checkpoint.tensors) == {f"{name}.weight" for name in expected}
    for name, weight in expected.items():
        assert checkpoint.tensors[f"{name}.weight"].shape == tuple(weight.shape)
        assert torch.equal(checkpoint.read(f"{name}.weight").to(weight.dtype), weight), name
    kinds = {name: matrix_of(checkpoint, f"{name}.weight") for name in expected}
    assert {name for name, matrix in kinds.items() if matrix and matrix.is_w8} == {"int8", "int8_whole"}


def test_fp8(tmp_path: Path) -> None:
    checkpoint = wide_checkpoint()
    checkpoint.config["quantization_config"] = written.compressed_config("float-quantized", 8, None, kind="float")
    dense = dataclasses.replace(checkpoint, weights=dict(checkpoint.weights))
    for number, module in enumerate(layers_of(checkpoint)):
        weight = torch.randn(checkpoint.weights[f"{module}.weight"].shape).to(torch.float8_e4m3fn)
        scale = (torch.rand(len(weight), 1) if number % 2 else torch.rand(1)) / 16
        put(checkpoint, module, {"weight": weight, "weight_scale": scale, "input_scale": torch.ones(1)})
        dense.weights[f"{module}.weight"] = weight.float() * scale
    notes = assert_stands_for(checkpoint, dense, tmp_path)
    assert any("14 weights are published in fp8" in note for note in notes)
    assert any(note.startswith("model.layers.0.mlp.down_proj.input_scale and 13 more left out") for note in notes)


def test_some_layers_are_not_quantised_whatever_ignore_says(tmp_path: Path) -> None:
    """The lists of config.json name none of the dense layers, and some that are quantised."""
    checkpoint = wide_checkpoint()
    modules = layers_of(checkpoint)
    config = written.compressed_config("pack-quantized", 4, 32)
    config["ignore"] = [modules[0], "re:.*down_proj"]
    checkpoint.config["quantization_config"] = config
    dense, _ = quantize_layers(
        checkpoint,
        modules[::2],
        lambda *shape: random_grid(*shape, 4, 32, symmetric=True, dtype=torch.bfloat16),
        written.packed,
    )
    assert_stands_for(checkpoint, dense, tmp_path)


def test_tower_projector_and_embedding_inside(tmp_path: Path) -> None:
    checkpoint = wide_checkpoint()
    checkpoint.config["quantization_config"] = written.gptq_config(4, -1)
    modules = [f"{TOWER}encoder.layers.{layer}.mlp.fc{number}" for layer in range(3) for number in (1, 2)]
    modules += ["model.mm_projector.0", "model.mm_projector.2", "model.embed_tokens"]
    dense, _ = quantize_layers(
        checkpoint, modules, lambda *shape: random_grid(*shape, 4, -1, symmetric=False), written.gptq
    )
    assert_stands_for(checkpoint, dense, tmp_path)


@pytest.mark.parametrize("quantised", [True, False])
def test_tower_in_a_directory_of_its_own(tmp_path: Path, quantised: bool) -> None:
    """Each directory's config.json tells of its own weights."""
    checkpoint = wide_checkpoint()
    vision = copy.deepcopy(checkpoint.config["vision_config"])
    checkpoint.weights = {name: each for name, each in checkpoint.weights.items() if not name.startswith(TOWER)}
    modules = layers_of(checkpoint)
    checkpoint.config["quantization_config"] = written.awq_config(32)
    quantize_layers(checkpoint, modules, lambda *shape: random_grid(*shape, 4, 32, symmetric=False), written.awq)
    if quantised:
        vision["quantization_config"] = written.gptq_config(8, -1)
    weights = write_tower(tmp_path / "tower", vision)
    expected = weights["encoder.layers.0.mlp.fc1.weight"]
    if quantised:
        grid = random_grid(*expected.shape, 8, -1, symmetric=False)
        expected = grid.values
        del weights["encoder.layers.0.mlp.fc1.weight"]
        weights |= {f"encoder.layers.0.mlp.fc1.{suffix}": each for suffix, each in written.gptq(grid).items()}
        save_weights({f"vision_model.{n}": w for n, w in weights.items()}, tmp_path / "tower" / "model.safetensors")
    path = checkpoint.write(tmp_path / "checkpoint")
    engine = build_engine(path, tmp_path / "engine", vision_tower=tmp_path / "tower", dtype="float32")
    assert torch.equal(engine.load_weights()["vision.layers.0.fc1.weight"], expected)


def test_biases_of_0_that_gptq_adds(tmp_path: Path) -> None:
    checkpoint = wide_checkpoint()
    checkpoint.config["quantization_config"] = written.gptq_config(4, 64)
    modules = layers_of(checkpoint)
    dense, _ = quantize_layers(
        checkpoint, modules, lambda *shape: random_grid(*shape, 4, 64, symmetric=False), written.gptq
    )
    for module in modules:
        checkpoint.weights[f"{module}.bias"] = torch.zeros(dense.weights[f"{module}.weight"].shape[0])
    assert_stands_for(checkpoint, dense, tmp_path)


def test_where_the_configuration_stands(tmp_path: Path) -> None:
    """In config.json under either name, in text_config, or in a file of its own as older versions wrote it."""
    for number, place in enumerate(("quantization_config", "compression_config", "text_config", "quant_config.json")):
        path = tmp_path / str(number)
        path.mkdir()
        config: dict[str, Any] = {place: written.awq_config(32)}
        if place == "text_config":
            config = {place: {"quantization_config": written.awq_config(32)}}
        if place == "quant_config.json":
            config = {}
            text = '{"zero_point": true, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}'
            (path / place).write_text(text)
        form = read_format(path, config)
        assert form is not None and form.name == "AWQ"
    assert read_format(tmp_path, {"quantization_config": None}) is None
