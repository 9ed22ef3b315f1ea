"""The models that are supported, as the tables of layouts, decoders and towers have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dpn_rt.builders.clip_config import TOWER_KINDS
from dpn_rt.builders.decoder_config import ROPE_TYPES
from dpn_rt.builders.decoder_families import FAMILIES, ORIGINAL_FAMILIES, Family
from dpn_rt.builders.hr_tower import FAMILIES as SLOW_PATHS
from dpn_rt.builders.huggingface_layout import MODEL_KINDS

Rows = Sequence[tuple[str, ...]]

_WINDOWS = {"never": "no", "always": "all layers", "on request": "layers of layer_types or max_window_layers"}


def supported_models() -> str:
    """Tables of text, by the keys of config.json that tell models apart."""
    names = {id(family): name for name, family in FAMILIES.items()}
    layouts = [
        *((name, "Hugging Face", "text_config", _images(name)) for name in MODEL_KINDS),
        *((name, "original", names[id(family)], "as mm_* keys say") for name, family in ORIGINAL_FAMILIES.items()),
        ("(any with llama in it)", "original", "llama", "as mm_* keys say"),
    ]
    towers = [
        *((name, kind.config.__name__.removesuffix("Config"), _yes(kind.has_class_row))
          for name, kind in TOWER_KINDS.items()),
        *((f"{name} (vision_tower_slow)", "LLaVA-HR", "no") for name in SLOW_PATHS),
    ]  # fmt: skip
    tables = [
        _table("models: model_type", ("layout", "decoder", "images"), layouts),
        _table(
            "decoders: text_config.model_type",
            ("sliding window", "normed heads", "biases"),
            [
                (name, _WINDOWS[family.windows], _yes(family.qk_norm), _biases(family))
                for name, family in FAMILIES.items()
            ],
        ),
        _table("towers: vision_config.model_type", ("tower", "class token"), towers),
        f"rotary rules: rope_type\n  {', '.join(ROPE_TYPES)}",
    ]
    return "\n\n".join(tables)


def _images(name: str) -> str:
    return "one view" if MODEL_KINDS[name].in_tiles is None else "in tiles"


def _biases(family: Family) -> str:
    if family.has_qkv_bias is None:
        return "attention_bias"
    return "queries, keys, values" if family.has_qkv_bias else "none"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _table(title: str, columns: tuple[str, ...], rows: Rows) -> str:
    lines = [(title, *columns), *((f"  {row[0]}", *row[1:]) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def padded() -> Iterator[str]:
        for line in lines:
            yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()

    return "\n".join(padded())
