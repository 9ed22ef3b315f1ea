"""An engine directory -> one TensorRT-LLM checkpoint per stage. Works without TensorRT-LLM."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dpn_rt.builders.names import tensorrt_llm_modules, weight_names
from dpn_rt.errors import ConfigError, EngineError
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.engine_dir import EngineDir
from dpn_rt.model.config import DecoderConfig
from dpn_rt.model.decoder_weights import head_module

ARCHITECTURE = "LlamaForCausalLM"


def export_checkpoints(engine: EngineDir, output: Path) -> list[Path]:
    """Write `stage{i}/config.json` and `stage{i}/rank0.safetensors` below `output`.

    Returns:
        The stages' directories.

    Raises:
        ConfigError: TensorRT-LLM has no place for something in the model.
        EngineError: `output` exists, or cannot be written.
    """
    model = engine.model
    stages = model.stage_layers
    configs = [stage_config(model, layers) for layers in stages]
    weights = engine.load_weights()
    directories = []
    try:
        output.mkdir(parents=True)
        for index, (layers, config) in enumerate(zip(stages, configs, strict=True)):
            directory = output / f"stage{index}"
            directory.mkdir()
            head = head_module(model.decoder) if index == len(stages) - 1 else None
            # Halves of the fused matrices are views of one tensor, which the writer refuses.
            tensors = {name: tensor.clone() for name, tensor in stage_tensors(weights, layers, head)}
            save_file(tensors, directory / "rank0.safetensors")
            (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            directories.append(directory)
    except OSError as error:
        raise EngineError(f"{output}: cannot be written: {error.strerror or error}") from error
    return directories


def stage_tensors(weights: Mapping[str, Tensor], layers: range, head: str | None) -> Iterator[tuple[str, Tensor]]:
    """A stage's tensors under TensorRT-LLM's names.

    Args:
        weights: canonical, of the whole model.
        layers: of the stage.
        head: see `tensorrt_llm_modules`.
    """
    modules = tensorrt_llm_modules(layers, head)
    own = [name for name in weights if name.rpartition(".")[0] in modules]
    for name, exported in weight_names(own, modules).items():
        yield from zip(exported, torch.chunk(weights[name], len(exported)), strict=True)  # of equal size


def stage_config(model: ModelConfig, layers: range) -> dict[str, Any]:
    """`config.json` of one stage: a model of its layers alone, on one GPU.

    TensorRT-LLM's pipeline ranks do not fit: they communicate inside the model and split the layers evenly.

    Raises:
        ConfigError: a scaled rotary embedding, whose rules differ, a bias of one attention projection alone, sliding
            windows, or norms of heads.
    """
    decoder = model.decoder
    for what, is_there in (("sliding windows", any(decoder.windows)), ("norms of heads", decoder.qk_norm)):
        if is_there:
            raise ConfigError(f"the decoder has {what}: expected none for an export to TensorRT-LLM")
    if decoder.rope.scaling_json:
        raise ConfigError(f"rope scaling {decoder.rope.scaling_json}: expected none for an export to TensorRT-LLM")
    if decoder.qkv_bias != decoder.o_bias:
        raise ConfigError(
            f"qkv_bias {decoder.qkv_bias}, o_bias {decoder.o_bias}: expected both or none for an export to TensorRT-LLM"
        )
    return {
        "architecture": ARCHITECTURE,
        "dtype": model.dtype,
        "logits_dtype": "float32",
        "vocab_size": decoder.vocab_size,
        "num_hidden_layers": len(layers),
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": decoder.rope.theta,
        "hidden_act": "silu",
        "norm_epsilon": decoder.rms_norm_eps,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        **_sizes(decoder),
    }


def _sizes(decoder: DecoderConfig) -> dict[str, Any]:
    return {
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_size": decoder.head_dim,
        "max_position_embeddings": decoder.max_position_embeddings,
        "attn_bias": decoder.qkv_bias,
    }
