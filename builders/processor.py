"""Tokenizer and image processor files: which ones an engine carries, and what they say about the prompt."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpn_rt.builders.json_values import Json, read_json
from dpn_rt.errors import CheckpointError, ConfigError
from dpn_rt.model.vision.clip.config import ClipConfig

ROUTER_TOKEN = "<ROUTER>"
IMAGE_TOKEN = "<image>"

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKENIZER_FILES = (
    *_VOCABULARIES,
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
_IMAGE_PROCESSOR = "preprocessor_config.json"

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What the builder needs to know of a tokenizer."""

    size: int
    bos_token_id: int | None
    eos_token_id: int | None
    image_token_id: int | None
    router_token_id: int | None
    has_chat_template: bool


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """Content by name of the checkpoint's tokenizer files; empty without a vocabulary."""
    if not any((path / name).is_file() for name in _VOCABULARIES):
        return {}
    files = {name: (path / name).read_bytes() for name in _TOKENIZER_FILES if (path / name).is_file()}
    settings = read_json(path / "tokenizer_config.json") if "tokenizer_config.json" in files else {}
    if "tokenizer_class" not in settings:  # transformers would look for it in config.json, which an engine lacks
        kind = "LlamaTokenizer" if "tokenizer.model" in files else "PreTrainedTokenizerFast"
        files["tokenizer_config.json"] = _json_bytes({**settings, "tokenizer_class": kind})
    if "chat_template.jinja" not in files and not settings.get("chat_template"):
        template = _chat_template(path)
        if template is not None:
            files["chat_template.jinja"] = template.encode()
    return files


def _chat_template(path: Path) -> str | None:
    """A template that transformers 4 kept with the processor instead of with the tokenizer."""
    for name in ("chat_template.json", "processor_config.json"):
        template = read_json(path / name).get("chat_template") if (path / name).is_file() else None
        if isinstance(template, str):
            return template
    return None


def read_tokenizer(path: Path, files: Mapping[str, bytes]) -> TokenizerFacts:
    """Load the tokenizer from just these files, as the runtime will.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as directory:
        for name, data in files.items():
            (Path(directory) / name).write_bytes(data)
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a tokenizer's reader raises, the user's tokenizer files are the reason
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(f"{path}: the tokenizer files cannot be loaded: {lines[0]}") from error
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        return TokenizerFacts(
            size=max(vocabulary.values()) + 1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            image_token_id=vocabulary.get(IMAGE_TOKEN),
            router_token_id=vocabulary.get(ROUTER_TOKEN),
            has_chat_template=bool(tokenizer.chat_template),
        )


def image_processor_file(path: Path, tower_path: Path | None, vision: ClipConfig) -> dict[str, bytes]:
    """The image processor's file: the checkpoint's, else the vision tower's, else CLIP's for the tower's image size.

    Raises:
        ConfigError: it makes images of another size than the tower takes.
    """
    for directory in (path, tower_path):
        settings = None if directory is None else _read_image_processor(directory)
        if settings is not None:
            _check_image_size(settings, vision.image_size)
            return {_IMAGE_PROCESSOR: _json_bytes(settings)}
    return {_IMAGE_PROCESSOR: _json_bytes(_clip_image_processor(vision.image_size))}


def _read_image_processor(directory: Path) -> Json | None:
    if (directory / _IMAGE_PROCESSOR).is_file():
        return read_json(directory / _IMAGE_PROCESSOR)
    if (directory / "processor_config.json").is_file():  # transformers 5 keeps it inside the processor's file
        nested = read_json(directory / "processor_config.json").get("image_processor")
        return nested if isinstance(nested, dict) else None
    return None


def _check_image_size(settings: Json, image_size: int) -> None:
    key = "crop_size" if settings.get("do_center_crop", True) and settings.get("crop_size") else "size"
    value = settings.get(key)
    sides = value.values() if isinstance(value, dict) else [value]
    if any(side != image_size for side in sides if side is not None):
        raise ConfigError(
            f"{_IMAGE_PROCESSOR}: {key} is {value!r}, but the vision tower takes images of {image_size} pixels"
        )


def _clip_image_processor(image_size: int) -> dict[str, Any]:
    return {
        "crop_size": {"height": image_size, "width": image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": _CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": _CLIP_STD,
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": image_size},
    }


def _json_bytes(value: Json) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
