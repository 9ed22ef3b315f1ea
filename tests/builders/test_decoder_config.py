"""Decoders of all families from config.json: windows of layers, norms of heads, rotary rules, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dpn_rt.builders.decoder_config import decoder_config
from dpn_rt.builders.decoder_families import FAMILIES, ORIGINAL_FAMILIES
from dpn_rt.builders.json_values import Section
from dpn_rt.builders.tensorrt.plans import build_plans
from dpn_rt.errors import ConfigError
from dpn_rt.format.plans import PlanLimits
from dpn_rt.model.config import DecoderConfig, RopeConfig
from dpn_rt.model.rope import rope_frequencies
from tests.engine.models import MODEL, with_decoder

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
FULL, SLIDING = "full_attention", "sliding_attention"
QWEN = {"use_sliding_window": True, "sliding_window": 9}


def read(family: str, **values: Any) -> DecoderConfig:
    section = Section({**SIZES, **values}, "config.json: text_config.")
    return decoder_config(section, FAMILIES[family], tie_word_embeddings=False, sizes_may_be_absent=True)


@pytest.mark.parametrize(
    ("family", "values", "windows"),
    [
        ("llama", {}, ()),
        ("llama", {"sliding_window": 9}, ()),  # as in transformers, LLaMA has none
        ("mistral", {"sliding_window": 9}, (9, 9, 9, 9)),
        ("mistral", {"sliding_window": 1}, (1, 1, 1, 1)),
        ("mistral", {"sliding_window": None}, ()),
        ("mistral", {"sliding_window": 255}, (255,) * 4),
        ("mistral", {"sliding_window": 256}, ()),  # no sequence is longer
        ("mistral", {"sliding_window": 10**9}, ()),
        ("mistral", {"max_position_embeddings": 8192}, (4096,) * 4),
        ("mistral", {}, ()),
        ("qwen2", {"sliding_window": 9}, ()),
        ("qwen2", {"sliding_window": 9, "use_sliding_window": False, "max_window_layers": 0}, ()),
        ("qwen2", QWEN, ()),  # from layer 28 on
        ("qwen2", {**QWEN, "max_window_layers": 0}, (9, 9, 9, 9)),
        ("qwen2", {**QWEN, "max_window_layers": 3}, (None, None, None, 9)),
        ("qwen2", {**QWEN, "max_window_layers": 4}, ()),
        ("qwen2", {**QWEN, "sliding_window": None, "max_window_layers": 0}, ()),
        ("qwen3", {**QWEN, "max_window_layers": 2}, (None, None, 9, 9)),
        ("qwen3", {**QWEN, "layer_types": [SLIDING, FULL, SLIDING, FULL]}, (9, None, 9, None)),
        ("qwen3", {**QWEN, "max_window_layers": 0, "layer_types": [FULL] * 4}, ()),
        ("qwen2", {"layer_types": [FULL] * 4}, ()),
    ],
)
def test_windows_of_layers(family: str, values: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert read(family, **values).windows == windows


def test_families_are_as_in_transformers() -> None:
    """Every family with windows, norms and biases as transformers' own configuration of the same keys has them."""
    from transformers import AutoConfig

    for name, family in FAMILIES.items():
        theirs, ours = AutoConfig.for_model(name, **SIZES), read(name)
        assert ours.num_kv_heads == theirs.num_key_value_heads, name
        assert ours.head_dim == theirs.head_dim if name == "qwen3" else ours.head_dim == 8
        assert ours.qk_norm == (name == "qwen3")
        defaults = AutoConfig.for_model(name)
        for key, value in family.defaults.items():
            default = getattr(defaults, key)
            assert value == default or (key == "sliding_window" and family.windows == "on request"), (name, key)


def test_norms_and_biases_of_qwen3() -> None:
    plain, biased = read("qwen3", head_dim=16), read("qwen3", head_dim=16, attention_bias=True)
    assert (plain.qk_norm, plain.qkv_bias, plain.o_bias, plain.head_dim) == (True, False, False, 16)
    assert (biased.qkv_bias, biased.o_bias) == (True, True)
    assert read("qwen3").head_dim == 128, "its default, not hidden_size / num_attention_heads"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_as_many_heads_of_keys_as_of_queries_where_the_key_is_null(family: str) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(family, **SIZES, num_key_value_heads=None)
    assert read(family, num_key_value_heads=None).num_kv_heads == theirs.num_key_value_heads == 4


def test_swish_is_silu() -> None:
    assert read("llama", hidden_act="swish") == read("llama", hidden_act="silu")


@pytest.mark.parametrize("name", ORIGINAL_FAMILIES)
def test_families_of_the_original_layout(name: str) -> None:
    assert ORIGINAL_FAMILIES[name] in FAMILIES.values()


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("llama", {"use_sliding_window": True}, "text_config.use_sliding_window is not supported, expected false"),
        ("mistral", {"sliding_window": 0}, "text_config.sliding_window is 0, expected a positive number or null"),
        ("mistral", {"sliding_window": -1}, "sliding_window is -1, expected a positive number"),
        ("mistral", {"sliding_window": "9"}, "sliding_window: expected int, got '9'"),
        ("mistral", {"sliding_window": 9.5}, "sliding_window: expected int, got 9.5"),
        ("mistral", {"sliding_window": True}, "sliding_window: expected int, got True"),
        ("mistral", {"sliding_window": 10**30}, "sliding_window: expected a finite number"),
        ("qwen2", {**QWEN, "sliding_window": 0}, "sliding_window is 0, expected a positive"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window: expected bool, got 'yes'"),
        ("qwen2", {**QWEN, "max_window_layers": "all"}, "max_window_layers: expected int, got 'all'"),
        ("qwen2", {**QWEN, "layer_types": SLIDING}, f"layer_types: expected a list of {FULL} and {SLIDING}, got"),
        ("qwen3", {**QWEN, "layer_types": [FULL, "chunked_attention"] * 2}, "layer_types: expected a list of"),
        ("qwen3", {**QWEN, "layer_types": [[], {}, 1, None]}, "layer_types: expected a list of"),
        ("qwen3", {**QWEN, "layer_types": [SLIDING] * 3}, "layer_types has 3 entries, expected 4, one for each layer"),
        ("qwen3", {"layer_types": [SLIDING, FULL] * 2}, "where there is no sliding window"),
        ("qwen3", {**QWEN, "sliding_window": None, "layer_types": [SLIDING] * 4}, "where there is no sliding window"),
        ("mistral", {"num_hidden_layers": 10**12}, "num_layers must be at most 1024"),
        ("qwen3", {"head_dim": 0}, "head_dim must be positive, got 0"),
        ("llama", {"hidden_size": 33}, "hidden_size 33 is not a multiple of num_attention_heads 4"),
        ("llama", {"mlp_bias": True}, "text_config.mlp_bias is not supported, expected false"),
        ("qwen2", {"is_causal": False}, "text_config.is_causal is not supported, expected true"),
    ],
)
def test_what_is_refused(family: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as info:
        read(family, **values)
    assert message in str(info.value)
    assert str(info.value).startswith("config.json: ")


ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_rotary_rules(key: str, kind: str) -> None:
    found = read("llama", **{key: {**ROPE, "rope_type": kind}}).rope
    assert found == RopeConfig(1e4, f'{{"factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "{kind}"}}')


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("longrope", "rope_type: expected one of default, linear, dynamic, yarn, llama3; got 'longrope'"),
        ("su", "rope_type: expected one of default, linear, dynamic, yarn, llama3; got 'su'"),
        ("proportional", "got 'proportional'"),
        ("mrope", "got 'mrope'"),
        (3, "got 3"),
        ([], "got []"),
        (None, "got None"),
    ],
)
def test_rotary_rules_that_are_refused(key: str, kind: object, message: str) -> None:
    with pytest.raises(ConfigError) as info:
        read("llama", **{key: {**ROPE, "rope_type": kind}})
    assert str(info.value).startswith(f"config.json: text_config.{key}.") and message in str(info.value)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "values",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": None}},
        {"rope_scaling": {"type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64},
        {"rope_scaling": YARN, "original_max_position_embeddings": 64, "rope_theta": 5e4},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "original_max_position_embeddings": 64},
        {"rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": 5e4}, "rope_theta": 5e4},
        {"rope_scaling": {**YARN, "rope_theta": 5e4}, "rope_parameters": {"type": "yarn", **YARN, "rope_theta": 5e4}},
    ],
)
def test_rotary_angles_are_those_of_transformers(values: dict[str, Any]) -> None:
    """Where they say what a rule leaves out, and where both spellings stand beside each other."""
    from transformers import LlamaConfig, LlamaModel

    values = copy.deepcopy(values)  # transformers writes into its arguments
    frequencies, scale = rope_frequencies(read("llama", **values))
    if values.get("rope_parameters", {}).get("original_max_position_embeddings", 0) is None:
        del values["rope_parameters"]["original_max_position_embeddings"]  # transformers takes no null here
    theirs = LlamaModel(LlamaConfig(**SIZES, **values)).rotary_emb
    torch.testing.assert_close(frequencies, theirs.inv_freq, atol=0, rtol=0)
    assert scale == theirs.attention_scaling


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 32},
            "text_config.rope_scaling.original_max_position_embeddings is 64, but config.json: "
            "text_config.original_max_position_embeddings is 32",
        ),
        ({"rope_scaling": YARN, "original_max_position_embeddings": "64"}, "expected int, got '64'"),
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "but rope_parameters {'rope_type': 'default', 'rope_theta': 1000000.0}: expected one of them",
        ),
        ({"rope_scaling": YARN, "rope_parameters": {**YARN, "rope_theta": 1e6}}, "expected one of them"),
    ],
)
def test_rotary_rules_that_contradict_each_other(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as info:
        read("llama", **values)
    assert message in str(info.value)


LIMITS = PlanLimits(4, 2, (256, 192, 128, 64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"windows": (None, 255, *[None] * 5)},
            r"no sliding windows: rows per stage \[256, 192, 128, 64\], expected at most the window of 255",
        ),
        ({"windows": (7,) * 7}, "expected at most the window of 7; or use --backend native"),
        ({"qk_norm": True}, "TensorRT plans have no norms of heads"),
    ],
)
def test_plans_refuse_what_they_do_not_compute(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_plans(with_decoder(**changes), "rtx", ["86"], LIMITS)


def test_plans_take_windows_that_hide_nothing() -> None:
    with pytest.raises(ConfigError, match="no float32 attention"):  # the next thing that is checked
        build_plans(with_decoder(MODEL, windows=(256,) * 7), "rtx", ["86"], LIMITS)
