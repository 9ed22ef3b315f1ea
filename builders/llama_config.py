"""The decoder's configuration from LLaMA's keys in config.json, in either layout, spelled as in transformers 4 or 5."""

from __future__ import annotations

import json

from dpn_rt.builders.json_values import Json, Section, choice_of, name_of, object_of, value_of
from dpn_rt.errors import ConfigError
from dpn_rt.model.config import DecoderConfig, RopeConfig

# Defaults of transformers' LlamaConfig, which the Hugging Face layout leaves out.
_DEFAULT_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_ROPE_TYPES = ("linear", "dynamic", "yarn", "longrope", "llama3")


def decoder_config(values: Json, *, tie_word_embeddings: bool, sizes_may_be_absent: bool) -> DecoderConfig:
    """The decoder that LLaMA's keys in `values` describe.

    Args:
        sizes_may_be_absent: as in transformers, an absent size is that of LLaMA-7B; if False it is an error.

    Raises:
        ConfigError: a key is missing, has the wrong type, or asks for something that the runtime does not support.
    """

    def size(key: str) -> int:
        return value_of(values, key, int, _DEFAULT_SIZES[key] if sizes_may_be_absent else None)

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
    return DecoderConfig(
        vocab_size=size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=value_of(values, "num_key_value_heads", int, num_heads),
        head_dim=value_of(values, "head_dim", int, hidden_size // num_heads),
        rms_norm_eps=value_of(values, "rms_norm_eps", float, 1e-6),
        rope=_rope_config(values),
        max_position_embeddings=value_of(values, "max_position_embeddings", int, 2048),
        tie_word_embeddings=tie_word_embeddings,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
    )


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
            f"{name_of(scaling, 'rope_type')}: expected one of default, {', '.join(_ROPE_TYPES)}; got {rope_type!r}"
        )
    return RopeConfig(theta, json.dumps(scaling, sort_keys=True))


def token_ids(values: Json, key: str) -> tuple[int, ...]:
    """`values[key]`, a token id or a list of them, each once; empty where there is none.

    Raises:
        ConfigError: an id is not an integer.
    """
    value = values.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ConfigError(f"{name_of(values, key)}: expected a token id or a list of them, got {value!r}")
    return tuple(dict.fromkeys(ids))
