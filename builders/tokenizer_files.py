"""Tokenizer files: which ones an engine carries, and what they say about the prompt."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpn_rt.builders.json_values import json_bytes, read_json
from dpn_rt.errors import CheckpointError

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


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What the builder needs to know about a tokenizer."""

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
    if "tokenizer_class" not in settings:  # transformers would look into config.json, which an engine lacks
        kind = "LlamaTokenizer" if "tokenizer.model" in files else "PreTrainedTokenizerFast"
        files["tokenizer_config.json"] = json_bytes({**settings, "tokenizer_class": kind})
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
        except Exception as error:  # of any kind: the user's tokenizer files are the reason
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
