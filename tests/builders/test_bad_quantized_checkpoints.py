"""Damaged quantised checkpoints and formats that are not read: each message names the tensor or the key."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpn_rt.builders.native import build_engine
from dpn_rt.errors import CheckpointError, ConfigError, DpnError
from tests.builders import quantized_checkpoints as written
from tests.builders.checkpoints import OriginalCheckpoint
from tests.builders.quantized_checkpoints import layers_of, put, random_grid, wide_checkpoint
from tests.builders.refusals import message_of, message_of_path

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def checkpoint_of(form: str) -> OriginalCheckpoint:
    """Groups of 64, asymmetric, except for `int8`: one scale a row."""
    checkpoint = wide_checkpoint()
    config = {
        "awq": written.awq_config(64),
        "gptq": written.gptq_config(4, 64),
        "packed": written.compressed_config("pack-quantized", 4, 64, symmetric=False),
        "int8": written.compressed_config("int-quantized", 8, None),
    }[form]
    checkpoint.config["quantization_config"] = config
    for module in layers_of(checkpoint):
        shape = checkpoint.weights[f"{module}.weight"].shape
        bits, group, symmetric = (8, -1, True) if form == "int8" else (4, 64, False)
        put(checkpoint, module, getattr(written, form)(random_grid(*shape, bits, group, symmetric=symmetric)))
    return checkpoint


def filled(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    place = (1, 5) if tensor.shape[1] > 2 else (5, tensor.shape[1] - 1)
    changed[place] = value
    return changed


DAMAGES: list[tuple[str, str, Callable[[Tensor], Tensor] | None, str]] = [
    (
        "packed",
        "weight_packed",
        lambda t: t[:, :-1],
        "weight_packed (expected int32 [128, 16], as weight_shape [128, 128] ",
    ),
    ("packed", "weight_packed", lambda t: t[:-8], "weight_packed (expected int32 [128, 16]"),
    (
        "packed",
        "weight_packed",
        lambda t: t.float(),
        "weight_packed (expected int32 [rows, columns], got float32 [128, 16])",
    ),
    ("packed", "weight_packed", lambda t: t[0], "weight_packed (expected int32 [rows, columns], got int32 [16])"),
    ("packed", "weight_scale", lambda t: t[:-1], "weight_scale (expected bfloat16 or float16 or float32 [128, 2], got"),
    (
        "packed",
        "weight_scale",
        lambda t: t[:, :1].repeat(1, 3),
        "weight_scale: 3 for a row of 128 columns, expected 2 as",
    ),
    (
        "packed",
        "weight_scale",
        lambda t: t.int(),
        "weight_scale (expected bfloat16 or float16 or float32 [128, 2], got int32",
    ),
    ("packed", "weight_scale", None, "weight_scale is missing (expected bfloat16 or float16 or float32"),
    (
        "packed",
        "weight_zero_point",
        lambda t: t[:-1],
        "weight_zero_point (expected int8 or uint8 or int32 or int64 [16, 2] or",
    ),
    ("packed", "weight_zero_point", lambda t: t[:, :1], "weight_zero_point (expected"),
    ("packed", "weight_zero_point", None, "weight_zero_point is missing"),
    ("packed", "weight_shape", lambda t: t[:1], "weight_shape (expected int64 or int32 [2], got int64 [1])"),
    (
        "packed",
        "weight_shape",
        lambda t: t * 2,
        "weight_packed (expected int32 [256, 32], as weight_shape [256, 256] and num_bits in config.json say, got [128",
    ),
    ("packed", "weight_shape", lambda t: -t, "weight_shape: expected rows and columns, got [-128, -128]"),
    ("packed", "weight_shape", None, "weight_shape is missing"),
    ("packed", "weight_packed", None, "weight_packed is missing (or weight, int8 or float8_e4m3fn)"),
    (
        "int8",
        "weight",
        lambda t: t.float(),
        "weight (expected int8 or float8_e4m3fn [rows, columns], got float32 [128, 128])",
    ),
    ("int8", "weight", lambda t: t[:-1], "weight_scale (expected bfloat16 or float16 or float32 [127, 1]"),
    ("int8", "weight_scale", lambda t: t.repeat(1, 2), "weight_scale: 2 for a row of 128 columns, expected 1 as"),
    ("awq", "qweight", lambda t: t[:-64], "scales: 2 for a row of 64 columns, expected 1 as group_size"),
    (
        "awq",
        "qweight",
        lambda t: t[:, :-1],
        "scales (expected bfloat16 or float16 or float32 [2, 120], got float16 [2, 128])",
    ),
    ("awq", "qzeros", lambda t: t[:, :-1], "qzeros (expected int32 [2, 16], got int32 [2, 15])"),
    ("awq", "qzeros", None, "qzeros is missing (expected int32 [2, 16])"),
    ("awq", "scales", lambda t: t[:1], "scales: 1 for a row of 128 columns, expected 2"),
    ("awq", "qweight", None, "qweight is missing"),
    (
        "gptq",
        "qweight",
        lambda t: t[:, :-8],
        "scales (expected bfloat16 or float16 or float32 [2, 120], got float16 [2, 128])",
    ),
    ("gptq", "qzeros", lambda t: t[:, :-1], "qzeros (expected int32 [2, 16], got int32 [2, 15])"),
    ("gptq", "scales", lambda t: t.t(), "scales: 128 for a row of 128 columns, expected 2"),
    ("gptq", "g_idx", lambda t: t[:-1], "g_idx (expected int8 or uint8 or int32 or int64 [128], got int32 [127])"),
    (
        "gptq",
        "g_idx",
        lambda t: t.flip(0),
        "g_idx: act-order (desc_act) is not read: expected column k in group k // 64",
    ),
    ("gptq", "g_idx", lambda t: t * 0, "g_idx: act-order (desc_act) is not read"),
]


@pytest.mark.parametrize(("form", "suffix", "change", "message"), DAMAGES)
def test_tensors_that_do_not_fit_each_other(
    tmp_path: Path, form: str, suffix: str, change: Callable[[Tensor], Tensor] | None, message: str
) -> None:
    checkpoint = checkpoint_of(form)
    tensor = checkpoint.weights.pop(f"{Q}.{suffix}")
    if change is not None:
        checkpoint.weights[f"{Q}.{suffix}"] = change(tensor)
    said = message_of(checkpoint, tmp_path)
    assert "tensors of quantised weights do not fit each other: " in said
    assert f"{Q}.{message}" in said


def test_groups_of_columns_in_compressed_tensors(tmp_path: Path) -> None:
    """A list of them may say what holds anyway, or be filled with -1; another order is refused."""
    checkpoint = checkpoint_of("packed")
    name = f"{Q}.weight_g_idx"
    in_order = torch.arange(128, dtype=torch.int32) // 64
    for number, index in enumerate((in_order, torch.full((128,), -1, dtype=torch.int32))):
        checkpoint.weights[name] = index
        build_engine(checkpoint.write(tmp_path / f"fine_{number}"), tmp_path / f"engine_{number}")
    checkpoint.weights[name] = in_order.roll(1)
    said = message_of_path(checkpoint.write(tmp_path / "checkpoint"), tmp_path)
    assert f"{name}: act-order (desc_act) is not read: expected column k in group k // 64" in said


def test_groups_of_two_sizes_that_cannot_be_told_apart(tmp_path: Path) -> None:
    """Rows of 128 columns have two groups of 64, or of 96 and 32."""
    checkpoint = checkpoint_of("packed")
    groups = checkpoint.config["quantization_config"]["config_groups"]
    groups["group_1"] = copy.deepcopy(groups["group_0"])
    groups["group_1"]["weights"]["group_size"] = 96
    assert f"{Q}.weight_scale: 2 for a row of 128 columns may be groups of 64 or 96" in message_of(checkpoint, tmp_path)


@pytest.mark.parametrize("order", ["group", "dynamic", "weight", "static", None])
def test_act_order_without_a_list_of_groups_in_compressed_tensors(tmp_path: Path, order: str | None) -> None:
    checkpoint = checkpoint_of("packed")
    checkpoint.config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = order
    if order not in ("group", "dynamic"):  # the columns lie in the order of their groups
        build_engine(checkpoint.write(tmp_path / "checkpoint"), tmp_path / "engine")
        return
    key = "config.json: quantization_config.config_groups.group_0.weights.actorder"
    assert f"{Q}.weight_g_idx is missing, which {key} asks for" in message_of(checkpoint, tmp_path)


@pytest.mark.parametrize("groups", [None, {"group_0": {"weights": None, "targets": ["Linear"]}}])
def test_packed_integers_that_config_says_nothing_of(tmp_path: Path, groups: object) -> None:
    checkpoint = checkpoint_of("packed")
    checkpoint.config["quantization_config"]["config_groups"] = groups
    said = message_of(checkpoint, tmp_path)
    assert f"{Q}.weight_packed: config.json: quantization_config.config_groups names no num_bits of integers" in said


def test_all_damaged_layers_are_named_together(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("awq")
    for module in (Q, DOWN):
        checkpoint.weights[f"{module}.qzeros"] = checkpoint.weights[f"{module}.qzeros"][:1]
    said = message_of(checkpoint, tmp_path)
    assert f"{Q}.qzeros (expected int32 [2, 16], got int32 [1, 16])" in said
    assert f"{DOWN}.qzeros (expected int32 [4, 16], got int32 [1, 16])" in said


def test_weights_of_another_size_than_config_says(tmp_path: Path) -> None:
    """Said as for any other checkpoint, with the shape that the packed tensors stand for."""
    checkpoint = checkpoint_of("gptq")
    checkpoint.config["intermediate_size"] = 192
    assert f"{DOWN}.weight (expected [128, 192], got [128, 256])" in message_of(checkpoint, tmp_path)


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("form", "suffix"), [("packed", "weight_scale"), ("int8", "weight_scale"), ("awq", "scales")])
def test_scales_that_are_no_numbers(tmp_path: Path, form: str, suffix: str, value: float, quantize: Any) -> None:
    checkpoint = checkpoint_of(form)
    name = f"{Q}.{suffix}"
    checkpoint.weights[name] = filled(checkpoint.weights[name], value)
    path = checkpoint.write(tmp_path / "checkpoint")
    said = message_of_path(path, tmp_path, quantize=quantize)
    group = 0 if form == "int8" else 1
    assert said == f"{name}: holds infinite values or NaN, first for output 5, group {group}"


@pytest.mark.parametrize(("form", "suffix"), [("packed", "weight_scale"), ("int8", "weight_scale")])
def test_a_scale_of_0(tmp_path: Path, form: str, suffix: str) -> None:
    """Refused where integers would be lost, and fine for rows that are 0."""
    checkpoint = checkpoint_of(form)
    name = f"{Q}.{suffix}"
    checkpoint.weights[name] = filled(checkpoint.weights[name], 0)
    path = checkpoint.write(tmp_path / "checkpoint")
    said = message_of_path(path, tmp_path)
    group = 1 if form == "packed" else 0
    assert said.startswith(
        f"{name}: the scale is 0 where integers are not, first for output 5, group {group}: expected"
    )
    if form == "int8":
        checkpoint.weights[f"{Q}.weight"][5] = 0
        path = checkpoint.write(tmp_path / "mended")
        for quantize in ("none", "int8"):
            engine = build_engine(path, tmp_path / quantize, dtype="float32", quantize=quantize)  # type: ignore[arg-type]
            weights = engine.load_weights()
            assert quantize == "int8" or not weights["layers.0.qkv.weight"][5].any()


def test_a_scale_of_0_in_fp8(tmp_path: Path) -> None:
    checkpoint = wide_checkpoint()
    checkpoint.config["quantization_config"] = written.compressed_config("float-quantized", 8, None, kind="float")
    weight = checkpoint.weights[f"{Q}.weight"].to(torch.float8_e4m3fn)
    put(checkpoint, Q, {"weight": weight, "weight_scale": torch.zeros(1)})
    assert f"{Q}.weight_scale: holds 0, infinite values or NaN" in message_of(checkpoint, tmp_path)
    weight[5] = 0
    scale = torch.ones(128, 1)
    scale[5] = 0
    put(checkpoint, Q, {"weight": weight, "weight_scale": scale})
    for quantize in ("none", "fp8"):
        build_engine(checkpoint.write(tmp_path / quantize), tmp_path / f"{quantize}_engine", quantize=quantize)  # type: ignore[arg-type]
    checkpoint.weights[f"{Q}.weight_scale"] = torch.ones(2, 2)
    assert f"{Q}.weight_scale (expected bfloat16 or float16 or float32 [128, 1] or" in message_of(checkpoint, tmp_path)


def test_dense_and_packed_at_once(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("packed")
    checkpoint.weights[f"{Q}.weight"] = torch.zeros(128, 128)
    assert f"{Q}: has both weight and weight_packed, expected one of them" in message_of(checkpoint, tmp_path)


@pytest.mark.parametrize("form", ["awq", "packed", "int8"])
def test_quantised_tensors_without_a_configuration(tmp_path: Path, form: str) -> None:
    checkpoint = checkpoint_of(form)
    del checkpoint.config["quantization_config"]
    said = message_of(checkpoint, tmp_path)
    assert "belongs to a quantised weight, but config.json has no quantization_config" in said


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "fp8", "exl2", "marlin", "mxfp4", "modelopt", "quanto"])
def test_methods_that_are_not_read(tmp_path: Path, method: str) -> None:
    checkpoint = wide_checkpoint()
    checkpoint.config["quantization_config"] = {"quant_method": method, "load_in_4bit": True}
    said = message_of(checkpoint, tmp_path, ConfigError)
    assert said.startswith(f"config.json: quantization_config.quant_method: {method!r} is not read, expected one of: ")
    for read in ("compressed-tensors", "AWQ", "GPTQ"):
        assert read in said


SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("awq", {"version": "gemv"}, "version: expected gemm, got 'gemv'"),
    ("awq", {"version": "marlin"}, "version: expected gemm, got 'marlin'"),
    ("awq", {"bits": 3}, "bits: expected 4, got 3"),
    ("awq", {"backend": "llm-awq"}, "backend: expected one of autoawq; got 'llm-awq'"),
    ("gptq", {"bits": 3}, "bits: expected 4 or 8, got 3"),
    ("gptq", {"bits": "4"}, "bits: expected int, got '4'"),
    ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format: expected one of gptq, gptq_v2; got 'marlin'"),
    ("gptq", {"is_marlin_format": True}, "is_marlin_format: marlin is not read"),
    ("packed", {"format": "marlin-24"}, "format: expected one of int-quantized, pack-quantized, .*; got 'marlin-24'"),
    ("packed", {"format": "nvfp4-pack-quantized"}, "format: expected one of .*; got 'nvfp4-pack-quantized'"),
    ("packed", {"format": "mxfp4-pack-quantized"}, "format: expected one of .*; got 'mxfp4-pack-quantized'"),
    ("packed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format: expected one of dense"),
    ("packed", {"transform_config": {"config_groups": {"u": {}}}}, "transform_config: transforms of activations"),
]


@pytest.mark.parametrize(("form", "changes", "message"), SETTINGS)
def test_settings_that_are_not_read(tmp_path: Path, form: str, changes: dict[str, Any], message: str) -> None:
    checkpoint = checkpoint_of(form)
    checkpoint.config["quantization_config"] |= changes
    path = checkpoint.write(tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match=f"^config.json: quantization_config.{message}"):
        build_engine(path, tmp_path / "engine")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_bits", 3, "num_bits: expected 4 or 8, got 3"),
        ("strategy", "block", "strategy: expected one of tensor, channel, group; got 'block'"),
        ("strategy", "tensor_group", "strategy: expected one of tensor, channel, group; got 'tensor_group'"),
        ("type", "float", "num_bits: expected 8, got 4"),
        ("group_size", "64", "group_size: expected int, got '64'"),
    ],
)
def test_schemes_that_are_not_read(tmp_path: Path, key: str, value: object, message: str) -> None:
    checkpoint = checkpoint_of("packed")
    checkpoint.config["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value
    said = message_of(checkpoint, tmp_path, ConfigError)
    assert said == f"config.json: quantization_config.config_groups.group_0.weights.{message}"


def test_act_order_without_a_list_of_groups(tmp_path: Path) -> None:
    checkpoint = checkpoint_of("gptq")
    checkpoint.config["quantization_config"]["desc_act"] = True
    build_engine(checkpoint.write(tmp_path / "in_order"), tmp_path / "fine")  # each layer's list says that it is not
    checkpoint.weights = {name: each for name, each in checkpoint.weights.items() if not name.endswith("g_idx")}
    said = message_of(checkpoint, tmp_path / "other", ConfigError)
    assert said == "config.json: quantization_config.desc_act: act-order is not read, expected false"


def test_gguf(tmp_path: Path) -> None:
    """A file, and a directory of files; beside other weights they do not matter."""
    file = tmp_path / "llava" / "model-Q4_0.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF" + bytes(100))
    for path in (file, file.parent):
        said = message_of_path(path, tmp_path, CheckpointError)
        assert said.startswith(f"{file}: GGUF is not read: expected a directory with safetensors")
        assert "AWQ (gemm)" in said
    (file.parent / "config.json").write_text(json.dumps(wide_checkpoint().config))
    assert "GGUF is not read" in message_of_path(file.parent, tmp_path, DpnError)
    wide_checkpoint().write(file.parent)
    assert build_engine(file.parent, tmp_path / "fine").model.quantize == "none"
