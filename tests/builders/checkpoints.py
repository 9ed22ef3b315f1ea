"""Small random checkpoints in the published layouts."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

KERNELS = [[1, 1], [1, 2], [2, 2]]

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mm_hidden_size": 24,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
    "router_token_id": 119,
    "pooling": {
        "pooling_type": "adaptive",
        "pooling_layers": [
            {"index": 0, "kernel_size": KERNELS, "stride": KERNELS},
            {"index": 2, "kernel_size": KERNELS, "stride": KERNELS},
        ],
        "pooling_function": "max",
        "pooling_location": "post",
        "prepooling": False,
        "use_special_token": True,
        "detach_cls_token_to_predict": False,
        "router_version": "v1",
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 28,
        "patch_size": 7,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}
TOWER = "model.vision_tower.vision_tower.vision_model."


@dataclass
class OriginalCheckpoint:
    """A checkpoint in the original layout; change `config` or `weights`, then write it."""

    config: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(CONFIG))
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def pooling(self) -> dict[str, Any]:
        pooling: dict[str, Any] = self.config["pooling"]
        return pooling

    def fill(self, dtype: torch.dtype = torch.float32) -> OriginalCheckpoint:
        """Random weights for the configuration as it is now, in one test always the same."""
        generator = torch.Generator().manual_seed(torch.initial_seed())
        self.weights = {
            name: (torch.randn(shape, generator=generator) * 0.1).to(dtype)
            for name, shape in {**self._decoder_shapes(), **self._pooling_shapes(), **self._vision_shapes()}.items()
        }
        return self

    def write(self, path: Path, *, suffix: str = "safetensors", shards: int = 1, index: bool = False) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config))
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        names = sorted(self.weights)
        weight_map = {}
        for number in range(shards):
            file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}" if shards > 1 or index else f"{stem}.{suffix}"
            part = {name: self.weights[name] for name in names[number::shards]}  # q, k and v land in different shards
            weight_map |= dict.fromkeys(part, file)
            save_weights(part, path / file)
        if index:
            text = json.dumps({"metadata": {}, "weight_map": weight_map})
            (path / f"{stem}.{suffix}.index.json").write_text(text)
        return path

    def _decoder_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.config
        hidden, inter, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        head = config.get("head_dim") or hidden // config["num_attention_heads"]
        query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (vocab, hidden),
            "model.norm.weight": (hidden,),
        }
        if not config.get("tie_word_embeddings"):
            shapes["lm_head.weight"] = (vocab, hidden)
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            for name, rows in (("q", query), ("k", key), ("v", key)):
                shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
            shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, query)
            if config.get("attention_bias"):
                for name, rows in (("q", query), ("k", key), ("v", key), ("o", hidden)):
                    shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
            shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (inter, hidden)
            shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inter)
            shapes[f"{prefix}input_layernorm.weight"] = shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
            shapes[f"{prefix}self_attn.rotary_emb.inv_freq"] = (head // 2,)
        return shapes

    def _pooling_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, shapes = self.config["hidden_size"], {}
        pooling = self.config.get("pooling") or {"pooling_layers": []}
        for layer in pooling["pooling_layers"]:
            prefix = f"model.layers.{layer['index']}."
            kernels = [layer["kernel_size"]] if pooling["pooling_type"] == "static" else layer["kernel_size"]
            if pooling["pooling_type"] == "adaptive" and pooling["router_version"] == "v1":
                shapes[f"{prefix}pooling_router.mlp1.0.weight"] = shapes[f"{prefix}pooling_router.mlp1.0.bias"] = (
                    hidden,
                )
                shapes[f"{prefix}pooling_router.mlp1.1.weight"] = (hidden // 4, hidden)
                shapes[f"{prefix}pooling_router.predictor.weight"] = (len(kernels), hidden // 4)
            elif pooling["pooling_type"] == "adaptive":
                shapes[f"{prefix}pooling_router.predictor.weight"] = (len(kernels), hidden)
            if pooling["pooling_function"] == "conv":
                for expert, kernel in enumerate(kernels):
                    shapes[f"{prefix}experts.{expert}.weight"] = (hidden, 1, *kernel)
        return shapes

    def _vision_shapes(self) -> dict[str, tuple[int, ...]]:
        vision, hidden = self.config.get("vision_config"), self.config["hidden_size"]
        if vision is None:
            return {}
        shapes = {f"{TOWER}{name}": shape for name, shape in tower_shapes(vision).items()}
        linears = {"0.": vision["hidden_size"], "2.": hidden}
        if self.config["mm_projector_type"] == "linear":
            linears = {"": vision["hidden_size"]}
        for name, columns in linears.items():
            shapes[f"model.mm_projector.{name}weight"] = (hidden, columns)
            shapes[f"model.mm_projector.{name}bias"] = (hidden,)
        return shapes


def tower_shapes(vision: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a CLIP vision tower, including the parts that never run."""
    hidden, inter, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (hidden,),
        "embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "embeddings.position_embedding.weight": ((vision["image_size"] // patch) ** 2 + 1, hidden),
        "embeddings.position_ids": (1, (vision["image_size"] // patch) ** 2 + 1),
    }
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (inter, hidden), "mlp.fc2": (hidden, inter)}
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"encoder.layers.{layer}."
        norms += [f"{prefix}layer_norm1", f"{prefix}layer_norm2"]
        for name, shape in linears.items():
            shapes[f"{prefix}{name}.weight"], shapes[f"{prefix}{name}.bias"] = shape, shape[:1]
    for name in norms:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (hidden,)
    return shapes


def write_tower(path: Path, vision: dict[str, Any], prefix: str = "vision_model.") -> dict[str, Tensor]:
    """Write a CLIP vision tower as a directory of its own; returns its weights without the prefix."""
    path.mkdir(parents=True)
    weights = {name: torch.randn(shape) for name, shape in tower_shapes(vision).items()}
    save_weights({prefix + name: tensor for name, tensor in weights.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(vision))
    return weights


def save_weights(weights: dict[str, Tensor], file: Path) -> None:
    if file.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    else:
        torch.save(weights, file)


def expected_weights(checkpoint: OriginalCheckpoint) -> dict[str, Tensor]:
    """Canonical weights in float32. They are fused here, not by the builders, so that the two check each other."""
    source = checkpoint.weights
    config = checkpoint.config
    result = {name: source[f"model.{name}"] for name in ("embed_tokens.weight", "norm.weight")}
    if "lm_head.weight" in source:
        result["lm_head.weight"] = source["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{layer}.", f"layers.{layer}."
        result[f"{new}input_norm.weight"] = source[f"{old}input_layernorm.weight"]
        result[f"{new}post_norm.weight"] = source[f"{old}post_attention_layernorm.weight"]
        for kind in ("weight", "bias") if config.get("attention_bias") else ("weight",):
            result[f"{new}qkv.{kind}"] = torch.cat([source[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"])
            result[f"{new}o.{kind}"] = source[f"{old}self_attn.o_proj.{kind}"]
        result[f"{new}gate_up.weight"] = torch.cat([source[f"{old}mlp.{x}_proj.weight"] for x in ("gate", "up")])
        result[f"{new}down.weight"] = source[f"{old}mlp.down_proj.weight"]
    return result | _expected_boundaries(checkpoint) | _expected_vision(checkpoint)


def _expected_boundaries(checkpoint: OriginalCheckpoint) -> dict[str, Tensor]:
    parts = {
        "mlp1.0.weight": "norm.weight",
        "mlp1.0.bias": "norm.bias",
        "mlp1.1.weight": "hidden.weight",
        "predictor.weight": "predictor.weight",
    }
    result = {}
    layers = (checkpoint.config.get("pooling") or {"pooling_layers": []})["pooling_layers"]
    for boundary, layer in enumerate(layers):
        for name, tensor in checkpoint.weights.items():
            prefix, _, rest = name.partition(f"model.layers.{layer['index']}.")
            if prefix or not rest.startswith(("pooling_router.", "experts.")):
                continue
            if rest.startswith("experts."):
                height, width = tensor.shape[2:]
                taps = [tensor[:, 0, y, x] for y in range(height) for x in range(width)]
                result[f"boundaries.{boundary}.{rest}"] = torch.stack(taps)
            else:
                result[f"boundaries.{boundary}.router.{parts[rest.removeprefix('pooling_router.')]}"] = tensor
    return result


def _expected_vision(checkpoint: OriginalCheckpoint) -> dict[str, Tensor]:
    source = checkpoint.weights
    result = {}
    for name, tensor in source.items():
        if name.startswith("model.mm_projector."):
            rest = name.removeprefix("model.mm_projector.")
            result[f"projector.{rest if rest[0].isdigit() else '0.' + rest}"] = tensor
    if TOWER + "embeddings.class_embedding" not in source:
        return result
    result["vision.class_embedding"] = source[f"{TOWER}embeddings.class_embedding"]
    result["vision.patch_embedding.weight"] = source[f"{TOWER}embeddings.patch_embedding.weight"].flatten(1)
    result["vision.position_embedding.weight"] = source[f"{TOWER}embeddings.position_embedding.weight"]
    for kind in ("weight", "bias"):
        result[f"vision.pre_norm.{kind}"] = source[f"{TOWER}pre_layrnorm.{kind}"]
        for layer in range(checkpoint.config["vision_config"]["num_hidden_layers"] - 1):  # select layer -2
            old, new = f"{TOWER}encoder.layers.{layer}.", f"vision.layers.{layer}."
            result[f"{new}qkv.{kind}"] = torch.cat([source[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"])
            result[f"{new}out.{kind}"] = source[f"{old}self_attn.out_proj.{kind}"]
            for number in (1, 2):
                result[f"{new}norm{number}.{kind}"] = source[f"{old}layer_norm{number}.{kind}"]
                result[f"{new}fc{number}.{kind}"] = source[f"{old}mlp.fc{number}.{kind}"]
    return result
