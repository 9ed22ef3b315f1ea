"""The sliding window of each decoder layer, from config.json."""

from __future__ import annotations

from dpn_rt.builders.decoder_families import Family
from dpn_rt.builders.json_values import Json, name_of, value_of
from dpn_rt.errors import ConfigError
from dpn_rt.model.config import shorter_windows
from dpn_rt.schema.text import shown

FULL, SLIDING = "full_attention", "sliding_attention"
"""Entries of `layer_types`."""


def decoder_windows(values: Json, family: Family, num_layers: int, max_positions: int) -> tuple[int | None, ...]:
    """Of each layer the positions that a row sees, its own included; None where it sees all; empty where all layers do.

    Args:
        values: of config.json.
        family: of the decoder.
        num_layers: of the decoder.
        max_positions: of the decoder: a window that is not shorter hides nothing.

    Raises:
        ConfigError: a window is no positive number, or `layer_types` contradicts the other keys.
    """
    if family.windows == "never":
        if value_of(values, "use_sliding_window", bool, False):
            raise ConfigError(f"{name_of(values, 'use_sliding_window')} is not supported, expected false")
        return ()
    is_always = family.windows == "always"
    is_used = is_always or value_of(values, "use_sliding_window", bool, False)
    window = _window(values, family) if is_used else None
    sliding = [True] * num_layers if is_always else _sliding_layers(values, family, num_layers, window)
    return shorter_windows(tuple(window if is_sliding else None for is_sliding in sliding), max_positions)


def _window(values: Json, family: Family) -> int | None:
    if "sliding_window" in values and values["sliding_window"] is None:
        return None
    window = value_of(values, "sliding_window", int, family.defaults["sliding_window"])
    if window < 1:
        raise ConfigError(f"{name_of(values, 'sliding_window')} is {window}, expected a positive number or null")
    return window


def _sliding_layers(values: Json, family: Family, num_layers: int, window: int | None) -> list[bool]:
    types = values.get("layer_types")
    if types is None:
        first = value_of(values, "max_window_layers", int, family.defaults["max_window_layers"])
        return [window is not None and layer >= first for layer in range(num_layers)]
    name = name_of(values, "layer_types")
    if not isinstance(types, list) or any(kind not in (FULL, SLIDING) for kind in types):
        raise ConfigError(f"{name}: expected a list of {FULL} and {SLIDING}, got {shown(types)}")
    if len(types) != num_layers:
        raise ConfigError(f"{name} has {len(types)} entries, expected {num_layers}, one for each layer")
    if SLIDING in types and window is None:
        raise ConfigError(f"{name} has {SLIDING}, expected {FULL} alone where there is no sliding window")
    return [kind == SLIDING for kind in types]
