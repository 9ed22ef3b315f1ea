"""Stages in TensorRT-LLM's checkpoint format: every tensor that is read back equals the engine's bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpn_rt.builders.tensorrt_llm.export import export_checkpoints
from dpn_rt.errors import ConfigError, EngineError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.model.config import RopeConfig
from tests.engine.models import MODEL, random_weights, with_decoder, write_random_engine

STAGES = [(0, 1), (2,), (3, 4), (5, 6)]
"""Layers of each stage of `MODEL`."""
HEADS, INTERMEDIATE = 4, 96


def parts(model: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """The engine's weights, with fused ones split into the matrices q, k, v, gate and up."""
    result = {}
    rows = [model.decoder.head_dim * n for n in (HEADS, model.decoder.num_kv_heads, model.decoder.num_kv_heads)]
    for name, tensor in random_weights(model, seed):
        prefix = name.rsplit(".", 2)[0]
        if not name.startswith("layers."):
            result[name] = tensor
        elif ".qkv." in name:
            kind = name.rsplit(".", 1)[1]
            for part, piece in zip("qkv", tensor.split(rows), strict=True):
                result[f"{prefix}.{part}.{kind}"] = piece
        elif ".gate_up." in name:
            result[f"{prefix}.gate"], result[f"{prefix}.up"] = tensor.split(INTERMEDIATE)
        else:
            result[name] = tensor
    return result


def read_back(directory: Path, layers: tuple[int, ...], model: ModelConfig) -> dict[str, torch.Tensor]:
    """A stage's tensors under the names of `parts`; an unknown name is an error."""
    found = load_file(directory / "rank0.safetensors")
    result = {}
    rows = [model.decoder.head_dim * n for n in (HEADS, model.decoder.num_kv_heads, model.decoder.num_kv_heads)]
    for local, layer in enumerate(layers):
        theirs = f"transformer.layers.{local}."
        for kind in ("weight", "bias"):
            fused = found.pop(f"{theirs}attention.qkv.{kind}", None)
            if fused is not None:
                for part, piece in zip("qkv", fused.split(rows), strict=True):
                    result[f"layers.{layer}.{part}.{kind}"] = piece
            dense = found.pop(f"{theirs}attention.dense.{kind}", None)
            if dense is not None:
                result[f"layers.{layer}.o.{kind}"] = dense
        result[f"layers.{layer}.gate"] = found.pop(f"{theirs}mlp.fc.weight")
        result[f"layers.{layer}.up"] = found.pop(f"{theirs}mlp.gate.weight")
        result[f"layers.{layer}.down.weight"] = found.pop(f"{theirs}mlp.proj.weight")
        result[f"layers.{layer}.input_norm.weight"] = found.pop(f"{theirs}input_layernorm.weight")
        result[f"layers.{layer}.post_norm.weight"] = found.pop(f"{theirs}post_layernorm.weight")
    for theirs, ours in (("transformer.ln_f.weight", "norm.weight"), ("lm_head.weight", "lm_head.weight")):
        if theirs in found:
            result[ours] = found.pop(theirs)
    assert not found
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "o_bias": True}, {"tie_word_embeddings": True}])
def test_every_tensor_is_the_engines(dtype: str, changes: dict[str, bool], tmp_path: Path) -> None:
    model = with_decoder(dataclasses.replace(MODEL, dtype=dtype), **changes)  # type: ignore[arg-type]
    engine = EngineDir.open(write_random_engine(tmp_path / "engine", model, seed=4))
    directories = export_checkpoints(engine, tmp_path / "stages")
    assert [directory.name for directory in directories] == ["stage0", "stage1", "stage2", "stage3"]
    wanted = parts(model, seed=4)
    if model.decoder.tie_word_embeddings:
        wanted["lm_head.weight"] = wanted["embed_tokens.weight"]
    decoder_weights = {name for name in wanted if name.startswith(("layers.", "norm.", "lm_head."))}
    seen = set()
    for directory, layers in zip(directories, STAGES, strict=True):
        for name, tensor in read_back(directory, layers, model).items():
            assert tensor.dtype == wanted[name].dtype, name
            assert torch.equal(tensor, wanted[name]), name
            seen.add(name)
    assert seen == decoder_weights


def test_each_stage_is_a_model_of_its_layers(tmp_path: Path) -> None:
    engine = EngineDir.open(write_random_engine(tmp_path / "engine"))
    configs = [
        json.loads((directory / "config.json").read_text()) for directory in export_checkpoints(engine, tmp_path / "s")
    ]
    assert [config["num_hidden_layers"] for config in configs] == [2, 1, 2, 2]
    for config in configs:
        assert config["architecture"] == "LlamaForCausalLM"
        assert config["mapping"] == {"world_size": 1, "tp_size": 1, "pp_size": 1}
        assert config["position_embedding_type"] == "rope_gpt_neox"
        assert (config["hidden_size"], config["intermediate_size"], config["head_size"]) == (64, 96, 16)
        assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
        assert (config["norm_epsilon"], config["rotary_base"]) == (1e-5, 10000.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope": RopeConfig(10000.0, '{"rope_type": "linear", "factor": 2.0}')}, "rope scaling"),
        ({"qkv_bias": True}, "qkv_bias True, o_bias False: expected both or none"),
        ({"windows": (None,) * 6 + (9,)}, "the decoder has sliding windows: expected none for an export"),
        ({"qk_norm": True}, "the decoder has norms of heads: expected none for an export"),
    ],
    ids=["rope", "bias", "windows", "norms"],
)
def test_what_has_no_place_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    engine = EngineDir.open(write_random_engine(tmp_path / "engine", with_decoder(**changes)))
    with pytest.raises(ConfigError, match=message):
        export_checkpoints(engine, tmp_path / "stages")
    assert not (tmp_path / "stages").exists()


def test_an_output_that_exists_is_not_touched(tmp_path: Path) -> None:
    engine = EngineDir.open(write_random_engine(tmp_path / "engine"))
    (tmp_path / "stages").mkdir()
    with pytest.raises(EngineError, match="stages: cannot be written"):
        export_checkpoints(engine, tmp_path / "stages")
