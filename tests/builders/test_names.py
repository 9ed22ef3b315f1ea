"""The table of published names has every canonical weight, and no published name twice."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.models.shapes import SHAPES
from dpn_rt.builders.names import (
    LayoutNames,
    NameMap,
    clip_weight,
    original_names,
    published_modules,
    tensorrt_llm_modules,
    tower_modules,
    weight_names,
)
from dpn_rt.format.config import ModelConfig
from dpn_rt.format.weight_spec import weight_spec
from dpn_rt.model.decoder_weights import decoder_specs, head_module

TINY = SHAPES["tiny"].model("float32")
CONV = dataclasses.replace(TINY.reduction, pooling_function="conv", router_version="v2")
BIASED = dataclasses.replace(TINY.decoder, qkv_bias=True, o_bias=True)
MODELS = {
    "v1": TINY,
    "conv-v2-bias": dataclasses.replace(TINY, reduction=CONV, decoder=BIASED),
    "tied": dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, tie_word_embeddings=True)),
}
LAYOUTS = {
    "original": original_names("mlp2x_gelu"),
    "huggingface": LayoutNames("language_model.model.", "language_model.lm_head", ("p.linear_1", "p.linear_2"), "p."),
}
TOWER = "vision_tower.vision_model."


def published(model: ModelConfig, layout: LayoutNames) -> NameMap:
    return weight_names(weight_spec(model), published_modules(model, layout, tower_modules(model.vision, TOWER)))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_weight_has_published_names_of_its_own(model: ModelConfig, layout: LayoutNames) -> None:
    spec, modules = weight_spec(model), published_modules(model, layout, tower_modules(model.vision, TOWER))
    assert {name.rpartition(".")[0] for name in spec} <= modules.keys()
    names = published(model, layout)
    assert names.keys() == spec.keys()
    everything = [name for parts in names.values() for name in parts]
    assert len(everything) == len(set(everything))
    for name, parts in names.items():
        assert len(parts) == len(spec[name].parts), name
        assert sum(part[0] for part in spec[name].parts) == spec[name].shape[0], name


def test_how_the_original_layout_spells_them() -> None:
    names = published(MODELS["conv-v2-bias"], LAYOUTS["original"])
    assert names["layers.4.qkv.bias"] == tuple(f"model.layers.4.self_attn.{part}_proj.bias" for part in "qkv")
    assert names["boundaries.1.router.predictor.weight"] == ("model.layers.3.pooling_router.predictor.weight",)
    assert names["boundaries.2.experts.1.weight"] == ("model.layers.5.experts.1.weight",)
    assert names["projector.2.bias"] == ("model.mm_projector.2.bias",)
    assert names["vision.class_embedding"] == (f"{TOWER}embeddings.class_embedding",)
    assert names["lm_head.weight"] == ("lm_head.weight",)
    assert clip_weight("vision.layers.0.fc1.weight") == "encoder.layers.0.mlp.fc1.weight"


def test_modules_that_are_not_listed_keep_their_names() -> None:
    assert weight_names(["projector.0.bias"], {}) == {"projector.0.bias": ("projector.0.bias",)}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_stages_of_tensorrt_llm_cover_the_decoder(model: ModelConfig) -> None:
    head = head_module(model.decoder)
    seen: list[str] = []
    for index, layers in enumerate(model.stage_layers):
        is_last = index == len(model.stage_layers) - 1
        modules = tensorrt_llm_modules(layers, head if is_last else None)
        own = [name for name in weight_spec(model) if name.rpartition(".")[0] in modules]
        everything = [name for parts in weight_names(own, modules).values() for name in parts]
        assert len(everything) == len(set(everything))
        assert all(name.startswith(("transformer.", "lm_head.")) for name in everything)
        seen += own
    specs = dict(decoder_specs(model.decoder, next(iter(weight_spec(model).values())).dtype))
    assert sorted(seen) == sorted(specs.keys() - ({"embed_tokens.weight"} if head == "lm_head" else set()))
