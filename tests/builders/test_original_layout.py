"""The original LLaVA/DPN layout: every canonical weight equals the published rows, for every kind of weight files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dpn_rt import LLM
from dpn_rt.builders.native import build_engine
from dpn_rt.errors import CheckpointError
from dpn_rt.format.engine_dir import EngineDir, weight_spec
from dpn_rt.model.reduction.pooling_config import BoundaryConfig
from dpn_rt.model.reduction.reduction import NoReduction
from dpn_rt.model.vision.clip.config import ClipConfig
from dpn_rt.model.vision.projector import ProjectorConfig
from tests.builders.checkpoints import TOWER, OriginalCheckpoint, expected_weights, write_tower
from tests.tiny_tokenizer import make_tokenizer


def assert_weights(engine: EngineDir, expected: dict[str, torch.Tensor]) -> None:
    """Asserts the same names, and the expected values after one cast."""
    spec, actual = weight_spec(engine.model), engine.load_weights()
    assert sorted(actual) == sorted(expected) == sorted(spec)
    for name, tensor in actual.items():
        assert (tuple(tensor.shape), tensor.dtype) == (spec[name].shape, spec[name].dtype)
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize(("shards", "index"), [(1, False), (1, True), (3, False), (3, True)])
def test_any_sharding_gives_the_same_engine(tmp_path: Path, suffix: str, shards: int, index: bool) -> None:
    checkpoint = OriginalCheckpoint().fill()
    path = checkpoint.write(tmp_path / "checkpoint", suffix=suffix, shards=shards, index=index)
    reference = checkpoint.write(tmp_path / "reference")
    engine = build_engine(path, tmp_path / "engine")
    assert_weights(EngineDir.open(engine.path), expected_weights(checkpoint))
    manifest = (build_engine(reference, tmp_path / "other").path / "engine.json").read_bytes()
    assert (engine.path / "engine.json").read_bytes() == manifest  # the fingerprint does not see the shards


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_dtypes(tmp_path: Path, source: torch.dtype, dtype: str | None) -> None:
    checkpoint = OriginalCheckpoint().fill(source)
    engine = build_engine(checkpoint.write(tmp_path / "c"), tmp_path / "e", dtype=dtype)  # type: ignore[arg-type]
    assert engine.model.dtype == (dtype or ("float32" if source == torch.float32 else "bfloat16"))
    assert_weights(engine, expected_weights(checkpoint))
    assert engine.load_weights()["boundaries.0.router.predictor.weight"].dtype == torch.float32


@pytest.mark.parametrize("function", ["max", "avg", "conv"])
@pytest.mark.parametrize(
    ("pooling_type", "version"), [("adaptive", "v1"), ("adaptive", "v2"), ("static", "v1"), ("random", "v1")]
)
def test_pooling(tmp_path: Path, pooling_type: str, function: str, version: str) -> None:
    checkpoint = OriginalCheckpoint()
    checkpoint.pooling.update(pooling_type=pooling_type, pooling_function=function, router_version=version)
    if pooling_type == "static":
        for layer in checkpoint.pooling["pooling_layers"]:
            layer.update(kernel_size=[1, 2], stride=[1, 2])
    engine = build_engine(checkpoint.fill().write(tmp_path / "c"), tmp_path / "e")
    assert_weights(engine, expected_weights(checkpoint))
    pyramid = engine.model.reduction
    assert (pyramid.pooling_type, pyramid.pooling_function, pyramid.router_version) == (pooling_type, function, version)
    kernels = ((1, 2),) if pooling_type == "static" else ((1, 1), (1, 2), (2, 2))
    assert pyramid.boundaries == (BoundaryConfig(0, kernels), BoundaryConfig(2, kernels))
    assert pyramid.use_router_token
    assert engine.model.prompt.router_token_id == 119


def test_dense_without_pooling(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint()
    del checkpoint.config["pooling"]
    engine = build_engine(checkpoint.fill().write(tmp_path / "c"), tmp_path / "e")
    assert_weights(engine, expected_weights(checkpoint))
    assert engine.model.reduction == NoReduction()
    assert engine.model.prompt.router_token_id is None


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"head_dim": 24, "num_key_value_heads": 4},
        {"mm_projector_type": "linear"},
        {"eos_token_id": [2, 7], "bos_token_id": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_variants(tmp_path: Path, changes: dict[str, object]) -> None:
    checkpoint = OriginalCheckpoint()
    checkpoint.config.update(changes)
    engine = build_engine(checkpoint.fill().write(tmp_path / "c"), tmp_path / "e")
    assert_weights(engine, expected_weights(checkpoint))
    decoder, prompt = engine.model.decoder, engine.model.prompt
    assert decoder.head_dim == changes.get("head_dim", 8)
    assert decoder.qkv_bias == decoder.o_bias == changes.get("attention_bias", False)
    assert decoder.tie_word_embeddings == changes.get("tie_word_embeddings", False)
    assert prompt.eos_token_ids == tuple(changes.get("eos_token_id", [2]))  # type: ignore[arg-type]
    assert prompt.bos_token_id == changes.get("bos_token_id", 1)
    assert engine.model.projector == ProjectorConfig(changes.get("mm_projector_type", "mlp2x_gelu"), 24)  # type: ignore[arg-type]


@settings(max_examples=15, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([8, 16, 24]),
    hidden=st.integers(1, 9).map(lambda quarter: 4 * quarter),
    inter=st.integers(1, 30),
    suffix=st.sampled_from(["safetensors", "bin"]),
    shards=st.integers(1, 5),
)
def test_fused_weights_are_exact_slices(
    tmp_path_factory: pytest.TempPathFactory,
    kv_heads: int,
    group: int,
    head_dim: int,
    hidden: int,
    inter: int,
    suffix: str,
    shards: int,
) -> None:
    path = tmp_path_factory.mktemp("slices")
    checkpoint = OriginalCheckpoint()
    checkpoint.config.update(hidden_size=hidden, intermediate_size=inter, head_dim=head_dim)
    checkpoint.config.update(num_attention_heads=kv_heads * group, num_key_value_heads=kv_heads)
    engine = build_engine(checkpoint.fill().write(path / "c", suffix=suffix, shards=shards), path / "e")
    assert_weights(engine, expected_weights(checkpoint))


def test_tied_head_that_is_saved_anyway_is_left_out(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.config["tie_word_embeddings"] = True
    checkpoint.weights["lm_head.weight"] = checkpoint.weights["model.embed_tokens.weight"].clone()
    engine = build_engine(checkpoint.write(tmp_path / "c"), tmp_path / "e")
    assert engine.model.decoder.tie_word_embeddings
    assert "lm_head.weight" not in engine.load_weights()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_not_the_embedding_counts_whatever_the_flag_says(tmp_path: Path, dtype: torch.dtype) -> None:
    notes: list[str] = []
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.config["tie_word_embeddings"] = True
    checkpoint.weights["lm_head.weight"] = checkpoint.weights["lm_head.weight"].to(dtype)
    engine = build_engine(checkpoint.write(tmp_path / "c"), tmp_path / "e", note=notes.append)
    assert not engine.model.decoder.tie_word_embeddings
    assert_weights(engine, expected_weights(checkpoint))
    assert [note for note in notes if "lm_head.weight is not the embedding" in note]


@pytest.mark.parametrize(
    ("scaling", "stored"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, '{"factor": 2.0, "rope_type": "linear"}'),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, ""),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}, "rope_theta": None},
            '{"factor": 8.0, "rope_type": "dynamic"}',
        ),
        ({"rope_scaling": None}, ""),
    ],
)
def test_rope_of_transformers_4_and_5(tmp_path: Path, scaling: dict[str, object], stored: str) -> None:
    checkpoint = OriginalCheckpoint()
    checkpoint.config.update(scaling)
    rope = build_engine(checkpoint.fill().write(tmp_path / "c"), tmp_path / "e").model.decoder.rope
    assert (rope.theta, rope.scaling_json) == (10000.0, stored)


@pytest.mark.parametrize(
    ("model_type", "changes", "windows", "norms"),
    [
        ("llava_mistral", {"sliding_window": 9}, (9,) * 4, False),
        ("llava_mistral", {}, (), False),
        (
            "llava_qwen",
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
            (*[None] * 3, 9),
            False,
        ),
        ("llava_qwen3", {"head_dim": 16}, (), True),
        ("llava", {}, (), False),
        ("tiny_llama_llava", {}, (), False),
    ],
)
def test_other_decoders(
    tmp_path: Path, model_type: str, changes: dict[str, Any], windows: tuple[int | None, ...], norms: bool
) -> None:
    checkpoint = OriginalCheckpoint()
    checkpoint.config.update(model_type=model_type, **changes)
    checkpoint.fill()
    head_dim = changes.get("head_dim", 8)
    for layer in range(4):
        prefix = f"model.layers.{layer}.self_attn."
        if norms:
            checkpoint.weights |= {f"{prefix}{name}_norm.weight": torch.randn(head_dim) for name in "qk"}
        if model_type == "llava_qwen":
            rows = {"q": 4 * head_dim, "k": 2 * head_dim, "v": 2 * head_dim}
            checkpoint.weights |= {f"{prefix}{name}_proj.bias": torch.randn(count) for name, count in rows.items()}
    engine = build_engine(checkpoint.write(tmp_path / "c"), tmp_path / "e")
    decoder, weights = engine.model.decoder, engine.load_weights()
    assert (decoder.windows, decoder.qk_norm, decoder.head_dim) == (windows, norms, head_dim)
    assert decoder.max_position_embeddings == 512
    for layer in range(4):
        theirs = checkpoint.weights
        for name in "qk" if norms else "":
            published = theirs[f"model.layers.{layer}.self_attn.{name}_norm.weight"]
            assert torch.equal(weights[f"layers.{layer}.{name}_norm.weight"], published)
        assert (f"layers.{layer}.qkv.bias" in weights) == (model_type == "llava_qwen")


@pytest.mark.parametrize(
    ("model_type", "written"),
    [("llava_mistral", "<s>[INST] <image>\nHello [/INST]"), ("llava_llama", "ASSISTANT:")],
)
def test_conversations_of_other_decoders_are_written_by_their_own_template(
    tmp_path: Path, model_type: str, written: str
) -> None:
    tokenizer = make_tokenizer(tmp_path / "c")
    settings = json.loads((tmp_path / "c/tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "[INST] {{ message.content }} [/INST]{% else %}{{ message.content }}</s>{% endif %}{% endfor %}"
    )
    (tmp_path / "c/tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = OriginalCheckpoint()
    checkpoint.config.update(model_type=model_type, pooling=None, vocab_size=tokenizer.vocab_size)
    checkpoint.config["router_token_id"] = tokenizer.router_id
    build_engine(checkpoint.fill().write(tmp_path / "c"), tmp_path / "e")
    llm = LLM(tmp_path / "e")
    content = [{"type": "image", "image": Image.new("RGB", (30, 20))}, {"type": "text", "text": "Hello"}]
    ids = llm.processor.chat([{"role": "user", "content": content}])["prompt_token_ids"]
    before, after = ids[: ids.index(-200)], ids[ids.index(-200) + 1 :]
    text = "<image>".join(llm.processor.tokenizer.decode(part, True) for part in (before, after))
    assert text.replace(" ", "").endswith(written.replace(" ", "").removeprefix("<s>"))


def test_norms_of_heads_are_no_part_of_other_decoders(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.weights["model.layers.0.self_attn.q_norm.weight"] = torch.randn(8)
    with pytest.raises(CheckpointError, match=r"unexpected .*: model.layers.0.self_attn.q_norm.weight"):
        build_engine(checkpoint.write(tmp_path / "c"), tmp_path / "e")


def test_engine_without_vision_takes_embeddings_only(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint()
    checkpoint.config["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    checkpoint.fill()
    checkpoint.weights = {name: tensor for name, tensor in checkpoint.weights.items() if not name.startswith(TOWER)}
    notes: list[str] = []
    engine = build_engine(checkpoint.write(tmp_path / "c"), tmp_path / "e", note=notes.append)
    assert engine.model.vision is None
    assert engine.model.projector == ProjectorConfig("mlp2x_gelu", 24)
    assert not engine.model.prompt.has_image_processor
    assert_weights(engine, expected_weights(checkpoint))
    assert any("openai/clip-vit-large-patch14-336" in note and "--vision-tower" in note for note in notes)


@pytest.mark.parametrize("place", ["absolute", "inside", "option"])
@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_vision_tower_from_a_directory(tmp_path: Path, place: str, prefix: str) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.weights = {name: tensor for name, tensor in checkpoint.weights.items() if not name.startswith(TOWER)}
    vision = checkpoint.config.pop("vision_config")
    directory = tmp_path / "c" / "tower" if place == "inside" else tmp_path / "tower"
    tower = write_tower(directory, vision, prefix)
    if place != "option":
        checkpoint.config["mm_vision_tower"] = "tower" if place == "inside" else str(directory)
    path = checkpoint.write(tmp_path / "c")
    engine = build_engine(path, tmp_path / "e", vision_tower=directory if place == "option" else None)
    assert engine.model.vision == ClipConfig(24, 40, 2, 3, 28, 7, 1e-5, "quick_gelu", "patch")
    checkpoint.config["vision_config"] = vision
    checkpoint.weights |= {TOWER + name: tensor for name, tensor in tower.items()}
    assert_weights(engine, expected_weights(checkpoint))


def test_vision_config_from_shapes_states_its_assumption(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint()
    checkpoint.config["vision_config"].update(hidden_size=64)
    checkpoint.config["mm_hidden_size"] = 64
    checkpoint.fill()
    del checkpoint.config["vision_config"]
    notes: list[str] = []
    engine = build_engine(checkpoint.write(tmp_path / "c"), tmp_path / "e", note=notes.append)
    assert engine.model.vision == ClipConfig(64, 40, 2, 1, 28, 7, 1e-5, "quick_gelu", "patch")
    assert any("assuming an OpenAI CLIP ViT with 1 heads" in note for note in notes)


@pytest.mark.parametrize(("select", "layers"), [(-1, 3), (-2, 2), (-4, 0), (0, 0), (1, 1), (3, 3)])
def test_select_layer(tmp_path: Path, select: int, layers: int) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.config["mm_vision_select_layer"] = select
    vision = build_engine(checkpoint.write(tmp_path / "c"), tmp_path / "e").model.vision
    assert vision is not None
    assert vision.num_layers == layers
