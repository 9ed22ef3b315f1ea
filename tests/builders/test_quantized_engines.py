"""Quantised checkpoints to quantised engines: what is taken over, and what is rounded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpn_rt import build as command
from dpn_rt.builders.native import build_engine
from dpn_rt.builders.quantized.matrix import FloatMatrix, IntegerMatrix
from dpn_rt.model.weights.fp8 import Fp8Weight
from dpn_rt.model.weights.int4 import Int4Weight
from dpn_rt.model.weights.int8 import Int8Weight
from dpn_rt.model.weights.tiles import unpack_int4, unpack_int8
from dpn_rt.schema.dtypes import DType, Quantize
from tests.builders import quantized_checkpoints as written
from tests.builders.checkpoints import expected_weights
from tests.builders.quantized_checkpoints import SAMPLES, layers_of, put, quantize_layers, random_grid, wide_checkpoint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_is_taken_over_number_by_number(tmp_path: Path, dtype: DType) -> None:
    """With a scale for each row, or for the whole matrix; fused from several matrices."""
    checkpoint = wide_checkpoint()
    checkpoint.config["quantization_config"] = written.compressed_config("float-quantized", 8, None, kind="float")
    published = {}
    for number, module in enumerate(layers_of(checkpoint)):
        weight = torch.randn(checkpoint.weights[f"{module}.weight"].shape).to(torch.float8_e4m3fn)
        scale = (torch.rand(len(weight), 1) + 0.1 if number % 2 else torch.rand(1) + 0.1).bfloat16()
        put(checkpoint, module, {"weight": weight, "weight_scale": scale})
        published[module] = weight.view(torch.uint8), scale.float().reshape(-1, 1).expand(len(weight), 1)[:, 0]
    notes: list[str] = []
    path = checkpoint.write(tmp_path / "checkpoint")
    engine = build_engine(path, tmp_path / "engine", dtype=dtype, quantize="fp8", note=notes.append)
    assert not any("rounded again" in note for note in notes)
    build_engine(path, tmp_path / "plain", dtype=dtype, note=notes.append)
    assert any("published in fp8" in note and "--quantize fp8 takes them over" in note for note in notes)
    weights = engine.load_weights()
    fused = {
        "qkv": [f"self_attn.{part}_proj" for part in "qkv"],
        "o": ["self_attn.o_proj"],
        "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    for layer in range(2):
        for name, parts in fused.items():
            matrices, scales = zip(*(published[f"model.layers.{layer}.{part}"] for part in parts), strict=True)
            assert torch.equal(weights[f"layers.{layer}.{name}.fp8"].view(torch.uint8), torch.cat(matrices))
            assert torch.equal(weights[f"layers.{layer}.{name}.scale"], torch.cat(scales))


def test_integers_are_no_8_bit_floats() -> None:
    q, scale = torch.ones(16, 32, dtype=torch.int8), torch.ones(16, 1)
    assert (
        IntegerMatrix((16, 32), 8, 32, "float32", "scale", lambda: q, lambda: scale, None).scale_for(Fp8Weight) is None
    )
    floats = FloatMatrix((16, 32), "float32", "scale", lambda: q.to(torch.float8_e4m3fn), lambda: scale)
    assert floats.scale_for(Int8Weight) is None and floats.scale_for(Int4Weight) is None


def taken(
    engine_weights: dict[str, Tensor], module: str, form: type[Int8Weight] | type[Int4Weight]
) -> tuple[Tensor, Tensor]:
    """Integers and scales [rows, groups] that an engine has."""
    tiles, scale = engine_weights[f"{module}.{form.suffix}"], engine_weights[f"{module}.scale"]
    if form is Int8Weight:
        return unpack_int8(tiles)[: len(scale)], scale[:, None]
    return unpack_int4(tiles), scale.transpose(1, 2).flatten(0, 1)


FITTING: list[tuple[str, int, int, bool, Quantize]] = [
    ("int8", 8, -1, True, "int8"),
    ("packed", 8, -1, True, "int8"),
    ("packed", 4, 128, True, "int4"),
    ("packed", 4, -1, True, "int4"),
    ("packed", 4, -1, True, "int8"),
    ("packed", 4, -1, False, "int8"),
    ("awq", 4, 128, True, "int4"),
    ("awq", 4, -1, False, "int8"),
    ("gptq", 4, 128, True, "int4"),
    ("gptq", 4, -1, True, "int4"),
    ("gptq", 8, -1, True, "int8"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("form", "bits", "group", "symmetric", "quantize"), FITTING)
def test_a_scheme_that_fits_is_taken_over(
    tmp_path: Path, form: str, bits: int, group: int, symmetric: bool, quantize: Quantize, dtype: Any
) -> None:
    """Integer by integer, with the published scales; -128 and -8 among them. Zero points are subtracted."""
    checkpoint = wide_checkpoint()
    named, scale_dtype = (None if group == -1 else group), torch.float16
    if form in ("int8", "packed"):
        name, scale_dtype = "int-quantized" if form == "int8" else "pack-quantized", torch.bfloat16
        config = written.compressed_config(name, bits, named, symmetric=symmetric)
    else:
        config = written.awq_config(group) if form == "awq" else written.gptq_config(bits, group)
    checkpoint.config["quantization_config"] = config
    _, grids = quantize_layers(
        checkpoint,
        layers_of(checkpoint),
        lambda *shape: random_grid(*shape, bits, group, symmetric=symmetric, dtype=scale_dtype),
        getattr(written, form),
    )
    notes: list[str] = []
    path = checkpoint.write(tmp_path / "checkpoint")
    engine = build_engine(path, tmp_path / "engine", dtype=dtype, quantize=quantize, note=notes.append)
    assert not [note for note in notes if "rounded again" in note or "published in" in note]
    weights, kind = engine.load_weights(), Int8Weight if quantize == "int8" else Int4Weight
    parts = {"qkv": [f"self_attn.{x}_proj" for x in "qkv"], "o": ["self_attn.o_proj"], "down": ["mlp.down_proj"]}
    for module, published in (parts | {"gate_up": ["mlp.gate_proj", "mlp.up_proj"]}).items():
        q, scale = taken(weights, f"layers.1.{module}", kind)
        of = [grids[f"model.layers.1.{name}"] for name in published]
        columns = np.arange(q.shape[1])
        expected = np.concatenate([each.q - each.zero[:, columns // each.group] for each in of])
        assert np.array_equal(q.numpy(), expected)
        scales = torch.cat([each.scale for each in of]).to(scale.dtype)
        assert torch.equal(scale, scales.expand_as(scale) if scales.shape[1] == 1 else scales)


def test_wider_groups_fill_several_of_an_engine() -> None:
    scale = torch.rand(16, 3).bfloat16()
    q = torch.randint(-8, 8, (16, 600), dtype=torch.int8)
    matrix = IntegerMatrix((16, 600), 4, 256, "bfloat16", "scale", lambda: q, lambda: scale, None)
    given = matrix.scale_for(Int4Weight)
    assert given is not None and torch.equal(given, scale.float()[:, [0, 0, 1, 1, 2]])
    assert matrix.scale_for(Int8Weight) is None
    stored = Int4Weight.quantize(matrix.read().bfloat16(), given)
    assert torch.equal(unpack_int4(stored["int4"]), q)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "quantize"),
    [
        (4, 32, True, "int4"),
        (4, 128, False, "int4"),
        (4, 64, True, "int8"),
        (8, -1, False, "int8"),
        (8, -1, True, "int4"),
    ],
)
def test_a_scheme_that_does_not_fit_is_rounded_again(
    tmp_path: Path, bits: int, group: int, symmetric: bool, quantize: Quantize
) -> None:
    checkpoint = wide_checkpoint()
    config = written.compressed_config("pack-quantized", bits, None if group == -1 else group, symmetric=symmetric)
    checkpoint.config["quantization_config"] = config
    dense, _ = quantize_layers(
        checkpoint,
        layers_of(checkpoint),
        lambda *shape: random_grid(*shape, bits, group, symmetric=symmetric, dtype=torch.bfloat16),
        written.packed,
    )
    notes: list[str] = []
    path = checkpoint.write(tmp_path / "checkpoint")
    engine = build_engine(path, tmp_path / "engine", dtype="float32", quantize=quantize, note=notes.append)
    (note,) = (each for each in notes if "rounded again" in each)
    assert note.startswith(f"14 quantised weights have other numbers, groups or zero points than {quantize} engines")
    form = Int8Weight if quantize == "int8" else Int4Weight
    expected = form.quantize(expected_weights(dense)["layers.0.qkv.weight"])
    weights = engine.load_weights()
    for suffix, tensor in expected.items():
        assert torch.equal(weights[f"layers.0.qkv.{suffix}"], tensor)


def test_a_fused_weight_with_dense_parts_is_rounded_again(tmp_path: Path) -> None:
    checkpoint = wide_checkpoint()
    checkpoint.config["quantization_config"] = written.compressed_config("int-quantized", 8, None)
    modules = [name for name in layers_of(checkpoint) if name.startswith("model.layers.0.") and "k_proj" not in name]
    dense, grids = quantize_layers(
        checkpoint, modules, lambda *shape: random_grid(*shape, 8, -1, symmetric=True), written.int8
    )
    notes: list[str] = []
    path = checkpoint.write(tmp_path / "checkpoint")
    weights = build_engine(
        path, tmp_path / "engine", dtype="float32", quantize="int8", note=notes.append
    ).load_weights()
    (note,) = (each for each in notes if "rounded again" in each)
    assert note.startswith("2 quantised weights") and note.endswith("q_proj.weight and 1 more")
    again = Int8Weight.quantize(expected_weights(dense)["layers.0.qkv.weight"])
    assert torch.equal(weights["layers.0.qkv.int8"], again["int8"])
    q, scale = taken(weights, "layers.0.o", Int8Weight)
    grid = grids["model.layers.0.self_attn.o_proj"]
    assert np.array_equal(q.numpy(), grid.q - 128) and torch.equal(scale, grid.scale.float())


def test_the_command_says_what_a_checkpoint_becomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(SAMPLES / "w8a8"), "--output"]
    assert command.main([*arguments, str(tmp_path / "engine")]) == 0
    printed = capsys.readouterr()
    assert "int8 and bfloat16, 2 layers" in printed.out
    assert "so the engine is int8 (--quantize none: bfloat16)" in printed.err
    assert command.main([*arguments, str(tmp_path / "dense"), "--quantize", "none"]) == 0
    assert "bfloat16, 2 layers" in (out := capsys.readouterr().out) and "int8" not in out


@pytest.mark.parametrize(
    ("rows", "group", "options", "expected"),
    [
        (True, None, {}, "int8"),
        (True, None, {"quantize": "none"}, "none"),
        (True, None, {"quantize": "int4"}, "int4"),
        (True, None, {"dtype": "float16"}, "none"),
        (False, None, {}, "none"),
        (True, 32, {}, "none"),
    ],
)
def test_what_an_engine_becomes(
    tmp_path: Path, rows: bool, group: int | None, options: dict[str, Any], expected: Quantize
) -> None:
    """int8 by itself where weights and rows are published in 8 bits, with a note; else as asked, or not quantised."""
    checkpoint = wide_checkpoint()
    checkpoint.fill(torch.bfloat16)
    checkpoint.config["quantization_config"] = written.compressed_config("int-quantized", 8, group, rows=rows)
    quantize_layers(
        checkpoint,
        layers_of(checkpoint),
        lambda *shape: random_grid(*shape, 8, group or -1, symmetric=True, dtype=torch.bfloat16),
        written.int8,
    )
    notes: list[str] = []
    path = checkpoint.write(tmp_path / "checkpoint")
    engine = build_engine(path, tmp_path / "engine", note=notes.append, **options)
    assert engine.model.quantize == expected
    assert engine.model.dtype == options.get("dtype", "bfloat16")
    said = [note for note in notes if "14 weights are published in 8 bits (compressed-tensors)" in note]
    assert len(said) == (options.get("quantize") != "int4")
    if not options:
        assert ("so the engine is int8" if expected == "int8" else "--quantize int8 or int4") in said[0]
