"""The Hugging Face layout, saved by transformers itself and rewritten into every spelling of the names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpn_rt.builders.native import build_engine
from dpn_rt.errors import CheckpointError, ConfigError
from dpn_rt.model.config import DecoderConfig, RopeConfig
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.model.vision.clip.config import ClipConfig
from tests.builders.huggingface_checkpoint import bare, edit_config, save_model

Rename = Callable[[str], str]


def transformers_4(name: str) -> str:
    """`vision_tower.vision_model.*`, `language_model.model.*`, `language_model.lm_head`."""
    name = bare(name)
    if name.startswith("vision_tower."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    return name.replace("language_model.", "language_model.model.", 1)


def transformers_5(name: str) -> str:
    """`model.language_model.*`, `lm_head`."""
    name = bare(name)
    return name if name.startswith("lm_head") else f"model.{name}"


def rename(path: Path, spelling: Rename) -> None:
    weights = load_file(path / "model.safetensors")
    save_file({spelling(name): tensor for name, tensor in weights.items()}, path / "model.safetensors")


@pytest.mark.parametrize("spelling", [transformers_4, transformers_5, None], ids=["4", "5", "as_saved"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_spelling(tmp_path: Path, spelling: Rename | None, tied: bool) -> None:
    source = save_model(tmp_path / "c", tied=tied, bias=tied)
    if spelling is not None:
        rename(tmp_path / "c", spelling)
    engine = build_engine(tmp_path / "c", tmp_path / "e")
    weights = engine.load_weights()
    for layer in range(3):
        published = f"language_model.layers.{layer}."
        for kind in ("weight", "bias") if tied else ("weight",):
            rows = [source[f"{published}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            assert torch.equal(weights[f"layers.{layer}.qkv.{kind}"], torch.cat(rows))
        rows = [source[f"{published}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(weights[f"layers.{layer}.gate_up.weight"], torch.cat(rows))
    for layer in range(2):
        published = f"vision_tower.encoder.layers.{layer}."
        rows = [source[f"{published}self_attn.{name}_proj.weight"] for name in "qkv"]
        assert torch.equal(weights[f"vision.layers.{layer}.qkv.weight"], torch.cat(rows))
    assert torch.equal(weights["embed_tokens.weight"], source["language_model.embed_tokens.weight"])
    assert torch.equal(weights["projector.0.weight"], source["multi_modal_projector.linear_1.weight"])
    assert torch.equal(weights["projector.2.bias"], source["multi_modal_projector.linear_2.bias"])
    patches = source["vision_tower.embeddings.patch_embedding.weight"]
    assert torch.equal(weights["vision.patch_embedding.weight"], patches.flatten(1))
    assert ("lm_head.weight" in weights) == (not tied)
    if not tied:
        assert torch.equal(weights["lm_head.weight"], source["lm_head.weight"])
    model = engine.model
    assert model.decoder == DecoderConfig(100, 32, 48, 3, 4, 2, 8, 1e-5, RopeConfig(10000.0), 256, tied, tied, tied)
    assert model.vision == ClipConfig(24, 40, 2, 3, 28, 7, 1e-5, "quick_gelu", "patch")
    assert model.reduction == NoReduction()
    assert (model.prompt.image_token_id, model.prompt.image_aspect_ratio) == (99, "processor")


def test_absent_text_config_values_are_those_of_llama_7b(tmp_path: Path) -> None:
    save_model(tmp_path / "c")
    edit_config(tmp_path / "c", text_config={"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5})
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight \(expected \[32064, 4096\], got \[100, 32\]\)"):
        build_engine(tmp_path / "c", tmp_path / "e")


def test_head_without_bias_and_select_strategy(tmp_path: Path) -> None:
    save_model(tmp_path / "c")
    weights = load_file(tmp_path / "c" / "model.safetensors")
    kept = {name: t for name, t in weights.items() if "projector" not in name or not name.endswith("bias")}
    save_file(kept, tmp_path / "c" / "model.safetensors")
    changes = {
        "multimodal_projector_bias": False,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": [-1],
    }
    edit_config(tmp_path / "c", **changes)
    engine = build_engine(tmp_path / "c", tmp_path / "e")
    assert not engine.load_weights()["projector.0.bias"].any()
    assert engine.model.vision is not None
    assert (engine.model.vision.select_feature, engine.model.vision.num_layers) == ("cls_patch", 3)
    assert engine.model.vision.num_visual_tokens == 17


@pytest.mark.parametrize(
    ("top", "text", "head", "tied"),
    [
        (True, False, "own", False),
        (True, False, "absent", True),
        (False, True, "absent", True),
        (True, True, "absent", True),
        (True, True, "copy", True),
        (True, True, "own", False),  # as in transformers 5: the flags are wrong
    ],
)
def test_where_tie_flags_are_in_doubt_the_weights_tell(
    tmp_path: Path, top: bool, text: bool, head: str, tied: bool
) -> None:
    save_model(tmp_path / "c")
    kept = load_file(tmp_path / "c" / "model.safetensors")
    (own,) = (name for name in kept if "lm_head" in name)
    if head == "absent":
        del kept[own]
    elif head == "copy":
        kept[own] = next(tensor for name, tensor in kept.items() if "embed_tokens" in name).clone()
    save_file(kept, tmp_path / "c" / "model.safetensors")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    text_config = {**config["text_config"], "tie_word_embeddings": text}
    edit_config(tmp_path / "c", tie_word_embeddings=top, text_config=text_config)
    engine = build_engine(tmp_path / "c", tmp_path / "e")
    assert engine.model.decoder.tie_word_embeddings == tied


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type: expected one of llava, llava_next, llava_onevision; got 'llama'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"vision_feature_layer": [-2, -5]}, "features of several layers are not supported"),
        ({"vision_feature_layer": -9}, "vision select layer -9 does not exist: a tower of 3 layers"),
        ({"vision_feature_layer": "last"}, "vision_feature_layer: expected int, got 'last'"),
        ({"vision_feature_select_strategy": "none"}, "vision_feature_select_strategy"),
        (
            {"text_config": {"model_type": "phi"}},
            "^config.json: text_config.model_type: expected one of llama, mistral, qwen2, qwen3; got 'phi' .--list",
        ),
        ({"text_config": {"model_type": "ministral"}}, "got 'ministral', nearest to mistral "),
        ({"text_config": {"model_type": "qwen2_vl_text"}}, "got 'qwen2_vl_text'"),
        ({"model_type": "llava_nexd"}, "model_type: expected one of llava.*got 'llava_nexd', nearest to .*llava"),
        (
            {"text_config": {"model_type": "llama", "use_sliding_window": True}},
            "^config.json: text_config.use_sliding_window is not supported",
        ),
        (
            {"text_config": {"model_type": "mistral", "sliding_window": "all"}},
            "^config.json: text_config.sliding_window: expected int, got 'all'",
        ),
        ({"text_config": {"hidden_size": "4096"}}, "^config.json: text_config.hidden_size: expected int, got '4096'"),
        ({"text_config": {"eos_token_id": "</s>"}}, "^config.json: text_config.eos_token_id: expected a token id"),
        ({"text_config": {"mlp_bias": True}}, "^config.json: text_config.mlp_bias is not supported"),
        ({"text_config": {"num_attention_heads": 7}}, "^config.json: text_config.hidden_size 4096 is not a multiple"),
        (
            {"text_config": {"rope_scaling": {"rope_type": "odd"}}},
            "^config.json: text_config.rope_scaling.rope_type: expected one of default, linear.*; got 'odd'",
        ),
        (
            {"text_config": {"rope_parameters": {"rope_theta": "big"}}},
            "^config.json: text_config.rope_parameters.rope_theta: expected float, got 'big'",
        ),
        (
            {"vision_config": {"model_type": "dinov2"}},
            "^config.json: vision_config.model_type: expected one of clip_vision_model, siglip.*; got 'dinov2'",
        ),
        (
            {"vision_config": {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7}},
            "vision_feature_select_strategy: default would leave out the first patch of a SigLIP tower",
        ),
        ({"vision_config": {"image_size": [1, 2]}}, "^config.json: vision_config.image_size: only square sizes"),
        ({"pooling": {"pooling_type": "odd"}}, "^config.json: pooling.pooling_type: expected one of adaptive"),
        (
            {
                "text_config": {
                    "pooling": {"pooling_type": "random", "pooling_layers": [{"index": 0, "kernel_size": 3}]}
                }
            },
            "^config.json: text_config.pooling.pooling_layers[0].kernel_size: expected a list of",
        ),
        ({"quantization_config": {"bits": 4}}, "^config.json: quantization_config.quant_method is missing"),
    ],
)
def test_unsupported_configurations(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    save_model(tmp_path / "c")
    edit_config(tmp_path / "c", **changes)
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        build_engine(tmp_path / "c", tmp_path / "e")
    assert not (tmp_path / "e").exists()
