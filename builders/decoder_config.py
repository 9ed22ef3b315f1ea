"""The decoder's configuration from config.json, in either layout, spelled as in transformers 4 or 5."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from dpn_rt.builders.decoder_families import Family
from dpn_rt.builders.json_values import Json, Section, choice_of, name_of, object_of, value_of
from dpn_rt.errors import ConfigError
from dpn_rt.model.config import DecoderConfig, RopeConfig
from dpn_rt.schema.bounds import FEW, bounded
from dpn_rt.schema.text import shown

_ROPE_TYPES = ("linear", "dynamic", "yarn", "longrope", "llama3")


def decoder_config(
    values: Json,
    family: Family,
    *,
    tie_word_embeddings: bool,
    sizes_may_be_absent: bool,
    note: Callable[[str], None],
) -> DecoderConfig:
    """The decoder that the keys in `values` describe.

    Args:
        family: of the decoder.
        sizes_may_be_absent: as in transformers, an absent size is the family's default; if False it is an error.
        note: takes a line about a limit of positions that the configuration does not have.

    Raises:
        ConfigError: a key is missing, has the wrong type, or asks for something that the runtime does not support.
    """
    defaults = family.defaults

    def size(key: str) -> int:
        return value_of(values, key, int, defaults[key] if sizes_may_be_absent else None)

    choice_of(values, "hidden_act", ("silu",), "silu")
    for key in ("mlp_bias", "use_sliding_window"):
        if value_of(values, key, bool, False):
            raise ConfigError(f"{name_of(values, key)} is not supported, expected false")
    hidden_size, num_heads = size("hidden_size"), size("num_attention_heads")
    if num_heads <= 0 or (values.get("head_dim") is None and hidden_size % num_heads):
        raise ConfigError(
            f"{name_of(values, 'hidden_size')} {hidden_size} is not a multiple of num_attention_heads {num_heads}"
        )
    attention_bias = value_of(values, "attention_bias", bool, False)
    config = DecoderConfig(
        vocab_size=size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=value_of(values, "num_key_value_heads", int, defaults.get("num_key_value_heads", num_heads)),
        head_dim=value_of(values, "head_dim", int, hidden_size // num_heads),
        rms_norm_eps=value_of(values, "rms_norm_eps", float, 1e-6),
        rope=_rope_config(values),
        max_position_embeddings=_max_positions(values, defaults, note),
        tie_word_embeddings=tie_word_embeddings,
        qkv_bias=attention_bias if family.has_qkv_bias is None else family.has_qkv_bias,
        o_bias=attention_bias if family.has_qkv_bias is None else False,
    )
    return bounded(config, name_of(values, ""))


def _max_positions(values: Json, defaults: Mapping[str, int], note: Callable[[str], None]) -> int:
    """The model's positions, or as many as its sliding window has: until then each row attends to all before it."""
    positions = value_of(values, "max_position_embeddings", int, defaults["max_position_embeddings"])
    if "sliding_window" not in defaults:
        return positions
    given = "sliding_window" in values and values["sliding_window"] is None
    window = positions if given else value_of(values, "sliding_window", int, defaults["sliding_window"])
    if window >= positions:
        return positions
    note(
        f"{name_of(values, 'sliding_window')} is {window}: prompt and answer may have {window} rows together, "
        f"though the model has {positions} positions"
    )
    return window


def _rope_config(values: Json) -> RopeConfig:
    """transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 has both in `rope_parameters`."""
    sections = [section for key in ("rope_scaling", "rope_parameters") if (section := object_of(values, key))]
    place = sections[-1].place if sections else name_of(values, "rope_parameters.")
    scaling = Section({key: value for section in sections for key, value in section.items()}, place)
    theta = value_of(scaling if "rope_theta" in scaling else values, "rope_theta", float, 10000.0)
    scaling.pop("rope_theta", None)
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{name_of(scaling, 'partial_rotary_factor')} is not supported, expected 1")
    old_name = scaling.pop("type", "default")
    rope_type = scaling.setdefault("rope_type", old_name)
    if rope_type == "default":
        return RopeConfig(theta)
    if rope_type not in _ROPE_TYPES:
        raise ConfigError(
            f"{name_of(scaling, 'rope_type')}: expected one of default, {', '.join(_ROPE_TYPES)}; "
            f"got {shown(rope_type)}"
        )
    return RopeConfig(theta, json.dumps(scaling, sort_keys=True))


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
