"""The decoder's configuration from config.json, in either layout, spelled as in transformers 4 or 5."""

from __future__ import annotations

import json
from dataclasses import replace

from dpn_rt.builders.decoder_families import Family
from dpn_rt.builders.decoder_windows import decoder_windows
from dpn_rt.builders.json_values import Json, Section, choice_of, name_of, object_of, value_of
from dpn_rt.errors import ConfigError
from dpn_rt.model.config import DecoderConfig, RopeConfig
from dpn_rt.schema.bounds import FEW, bounded
from dpn_rt.schema.text import shown

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
"""Rules of rotary angles. Those of `dynamic` are the plain ones up to the model's positions, beyond which no sequence
goes here. `longrope` is none of them: all its angles change when a sequence grows past a length."""
_ROPE_TYPES_WITH_ORIGIN = ("yarn", "llama3")
_ORIGIN = "original_max_position_embeddings"
_THETA = 10000.0


def decoder_config(
    values: Json, family: Family, *, tie_word_embeddings: bool, sizes_may_be_absent: bool
) -> DecoderConfig:
    """The decoder that the keys in `values` describe.

    Args:
        family: of the decoder.
        sizes_may_be_absent: as in transformers, an absent size is the family's default; if False it is an error.

    Raises:
        ConfigError: a key is missing, has the wrong type, or asks for something that the runtime does not support.
    """
    defaults = family.defaults

    def size(key: str) -> int:
        return value_of(values, key, int, defaults[key] if sizes_may_be_absent else None)

    choice_of(values, "hidden_act", ("silu", "swish"), "silu")  # two names of one function
    for key, only in (("mlp_bias", False), ("is_causal", True)):
        if value_of(values, key, bool, only) is not only:
            raise ConfigError(f"{name_of(values, key)} is not supported, expected {json.dumps(only)}")
    hidden_size, num_heads = size("hidden_size"), size("num_attention_heads")
    head_dim = defaults.get("head_dim")
    if num_heads <= 0 or (head_dim is None and values.get("head_dim") is None and hidden_size % num_heads):
        raise ConfigError(
            f"{name_of(values, 'hidden_size')} {hidden_size} is not a multiple of num_attention_heads {num_heads}"
        )
    attention_bias = value_of(values, "attention_bias", bool, False)
    # null is another thing than no key: as many as there are heads, in every family
    kv_heads = num_heads if "num_key_value_heads" in values else defaults.get("num_key_value_heads", num_heads)
    max_positions = value_of(values, "max_position_embeddings", int, defaults["max_position_embeddings"])
    config = DecoderConfig(
        vocab_size=size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=value_of(values, "num_key_value_heads", int, kv_heads),
        head_dim=value_of(values, "head_dim", int, hidden_size // num_heads if head_dim is None else head_dim),
        rms_norm_eps=value_of(values, "rms_norm_eps", float, 1e-6),
        rope=_rope_config(values, max_positions),
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie_word_embeddings,
        qkv_bias=attention_bias if family.has_qkv_bias is None else family.has_qkv_bias,
        o_bias=attention_bias if family.has_qkv_bias is None else False,
        qk_norm=family.qk_norm,
    )
    config = bounded(config, name_of(values, ""))
    return replace(config, windows=decoder_windows(values, family, config.num_layers, config.max_position_embeddings))


def _rope_config(values: Json, max_positions: int) -> RopeConfig:
    """transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 has both in `rope_parameters`."""
    sections = {key: section for key in ("rope_scaling", "rope_parameters") if (section := object_of(values, key))}
    rules = [_rope_rule(values, section, max_positions) for section in sections.values()]
    if len(rules) == 2 and rules[0] != rules[1]:
        # transformers 4 knows the first alone. So does transformers 5 then, which drops even the theta of the second.
        scaling, parameters = (shown(dict(section)) for section in sections.values())
        raise ConfigError(
            f"{name_of(values, 'rope_scaling')} is {scaling}, but rope_parameters {parameters}: expected one of them"
        )
    return rules[0] if rules else RopeConfig(value_of(values, "rope_theta", float, _THETA))


def _rope_rule(values: Json, section: Section, max_positions: int) -> RopeConfig:
    """The rule of one of the two objects."""
    scaling = Section(section, section.place)
    theta = value_of(scaling if "rope_theta" in scaling else values, "rope_theta", float, _THETA)
    scaling.pop("rope_theta", None)
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{name_of(scaling, 'partial_rotary_factor')} is not supported, expected 1")
    old_name = scaling.pop("type", "default")
    rope_type = scaling.setdefault("rope_type", old_name)
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"{name_of(scaling, 'rope_type')}: expected one of {', '.join(ROPE_TYPES)}; got {shown(rope_type)}"
        )
    nested = [key for key, value in scaling.items() if isinstance(value, dict)]
    if nested:
        raise ConfigError(f"{name_of(scaling, nested[0])}: expected one rule for all layers, got an object of its own")
    if rope_type == "default":
        return RopeConfig(theta)
    if rope_type in _ROPE_TYPES_WITH_ORIGIN:
        scaling[_ORIGIN] = _original_positions(values, scaling, max_positions)
    return RopeConfig(theta, json.dumps(scaling, sort_keys=True))


def _original_positions(values: Json, scaling: Json, max_positions: int) -> int:
    """The length that a model had before its angles were scaled; by default the one that it has.

    transformers 5 prefers the key beside the rule to the one in it, transformers 4 reads the one in it alone.
    """
    beside = value_of(values, _ORIGIN, int, max_positions)
    inside = value_of(scaling, _ORIGIN, int, beside)
    if values.get(_ORIGIN) is not None and inside != beside:
        raise ConfigError(f"{name_of(scaling, _ORIGIN)} is {inside}, but {name_of(values, _ORIGIN)} is {beside}")
    return inside


def token_ids(values: Json, key: str) -> tuple[int, ...]:
    """`values[key]`, a token id or a list of them, each once; empty where there is none.

    Raises:
        ConfigError: an id is not an integer, or there are too many.
    """
    value = values.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if len(ids) > FEW.most:
        raise ConfigError(f"{name_of(values, key)}: {len(ids):,} token ids, expected at most {FEW.most}")
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ConfigError(f"{name_of(values, key)}: expected a token id or a list of them, got {shown(value)}")
    return tuple(dict.fromkeys(ids))
