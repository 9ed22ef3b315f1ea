"""Tokenizer files: what a checkpoint has of them -> what an engine carries, and what they say about prompts.

The runtime tokenises with `tokenizer.json` alone. `special_tokens_map.json` has the texts of the special tokens, and
`chat_template.jinja` how conversations are written. `tokenizer_config.json` is carried for other software.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from dpn_rt.builders.chat_template import find_chat_template
from dpn_rt.builders.json_values import Json, json_bytes, read_json_if_there
from dpn_rt.builders.layout import Note
from dpn_rt.builders.temporary_files import temporary_files
from dpn_rt.errors import CheckpointError
from dpn_rt.prompts.markers import IMAGE_TEXT
from dpn_rt.schema.files import VOCABULARY_BYTES, is_there, read_file, read_text
from dpn_rt.schema.json_text import MAX_DIGITS
from dpn_rt.schema.text import shown

ROUTER_TOKEN = "<ROUTER>"

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SOURCES = (*_VOCABULARIES, "added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
"""Defaults of transformers' LlamaTokenizer."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What an engine carries of a tokenizer, and what the builder needs to know about it."""

    files: Mapping[str, bytes]
    vocabulary: Mapping[str, int]
    special_tokens: Mapping[str, str]
    """Text by name, such as `bos_token`."""
    chat_template: str | None

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.vocabulary.values()) + 1

    @property
    def bos_token_id(self) -> int | None:
        return self.vocabulary.get(self.special_tokens.get("bos_token", ""))

    @property
    def eos_token_id(self) -> int | None:
        return self.vocabulary.get(self.special_tokens.get("eos_token", ""))

    @property
    def image_token_id(self) -> int | None:
        return self.vocabulary.get(IMAGE_TEXT)

    @property
    def router_token_id(self) -> int | None:
        return self.vocabulary.get(ROUTER_TOKEN)

    def text_of(self, token_id: int | None) -> str | None:
        """The text of a token; None for an id that the vocabulary lacks."""
        return next((text for text, other in self.vocabulary.items() if other == token_id), None)


def read_tokenizer(path: Path, note: Note) -> TokenizerFiles | None:
    """The tokenizer of a checkpoint; None without a vocabulary.

    Args:
        path: of the checkpoint.
        note: takes a line about what its files contradict each other in.

    Raises:
        CheckpointError: a file is damaged, or they make no tokenizer.
    """
    if not any(is_there(path / name) for name in _VOCABULARIES):
        return None
    settings = read_json_if_there(path / "tokenizer_config.json")
    backend = _read_json(path) if is_there(path / "tokenizer.json") else _converted(path, settings)
    _add_missing_tokens(backend, path, settings, note)
    special_tokens = _special_tokens(path, settings, backend)
    template = find_chat_template(path, settings)
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "special_tokens_map.json": json_bytes(special_tokens),
        "tokenizer_config.json": json_bytes(
            {"tokenizer_class": "PreTrainedTokenizerFast", **_without_template(settings), **special_tokens}
        ),
        **({} if template is None else {"chat_template.jinja": template.encode()}),
    }
    return TokenizerFiles(files, backend.get_vocab(), special_tokens, template)


def _read_json(path: Path) -> tokenizers.Tokenizer:
    """`tokenizer.json` as it is: transformers' classes would replace parts of it."""
    text = read_text(path / "tokenizer.json", CheckpointError, VOCABULARY_BYTES)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(
            f"{path / 'tokenizer.json'}: damaged, or written by a newer version of the tokenizers library"
        ) from error


def _converted(path: Path, settings: Json) -> tokenizers.Tokenizer:
    """A tokenizer that transformers makes of a sentencepiece model, or of a vocabulary and merges."""
    from transformers import AutoTokenizer

    is_sentencepiece = (path / "tokenizer.model").is_file()
    found = [name for name in _SOURCES if is_there(path / name)]
    files = {name: read_file(path / name, CheckpointError, VOCABULARY_BYTES) for name in found}
    if "tokenizer_class" not in settings:  # transformers would look into config.json
        kind = "LlamaTokenizer" if is_sentencepiece else "PreTrainedTokenizerFast"
        files["tokenizer_config.json"] = json_bytes({**settings, "tokenizer_class": kind})
    # True is LLaMA's default. transformers 5 does not apply it to a sentencepiece model without this setting.
    options = {"add_bos_token": settings.get("add_bos_token", True)} if is_sentencepiece else {}
    with temporary_files(files) as directory:
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, **options
            )
        except Exception as error:  # of any kind: the user's tokenizer files are the reason
            raise CheckpointError(f"{path}: transformers cannot load the tokenizer of {sorted(files)}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise CheckpointError(f"{path}: transformers makes no tokenizer.json of {sorted(files)}, expected one")
    has_legacy_spaces = settings.get("legacy") is not False and settings.get("add_prefix_space") is not False
    if is_sentencepiece and has_legacy_spaces:
        _restore_legacy_spaces(backend)
    return backend


def _restore_legacy_spaces(backend: tokenizers.Tokenizer) -> None:
    """Makes a "legacy" sentencepiece model start every piece of text between special tokens with a space.

    LLaVA's models were trained with this space, and transformers 4 still adds it. transformers 5 leaves it out where
    the text already starts with one, as in `<ROUTER> ASSISTANT:`, which gives other ids.
    """
    from tokenizers import normalizers, pre_tokenizers

    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _add_missing_tokens(backend: tokenizers.Tokenizer, path: Path, settings: Json, note: Note) -> None:
    """Adds tokens that only other files than `tokenizer.json` have, as when a token was added by hand.

    Raises:
        CheckpointError: a token cannot get the id that its file gives it.
    """
    listed: dict[int, tokenizers.AddedToken] = {}
    file = path / "added_tokens.json"
    for text, token_id in read_json_if_there(file).items():
        listed[_id(token_id, text, file)] = tokenizers.AddedToken(text, normalized=False, special=True)
    decoder, file = settings.get("added_tokens_decoder"), path / "tokenizer_config.json"
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str):
            raise CheckpointError(f"{file}: added_tokens_decoder: {shown(token)}, expected an object with a content")
        flags = {key: bool(token.get(key)) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        listed[_id(number, content, file)] = tokenizers.AddedToken(content, **flags)
    tokens = sorted(listed.items())
    known = {added.content: backend.token_to_id(added.content) for _, added in tokens}
    backend.add_tokens([added for _, added in tokens if known[added.content] is None])  # at once: each call takes long
    for token_id, added in tokens:
        found = known[added.content]
        if found is None:
            if backend.token_to_id(added.content) != token_id:
                raise CheckpointError(
                    f"{path}: the token {added.content!r} has the id {token_id}, which is not the next one after "
                    "those of tokenizer.json"
                )
        elif found != token_id:
            note(f"the token {added.content!r} has the id {token_id}, but {found} in tokenizer.json, which is used")


def _id(value: object, text: str, file: Path) -> int:
    """A token id as JSON has it: a number, or the digits of one as a key."""
    token_id = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < MAX_DIGITS else value
    if type(token_id) is not int or token_id < 0:
        raise CheckpointError(f"{file}: the token {shown(text)} has the id {shown(value)}, expected a whole number")
    return token_id


def _special_tokens(path: Path, settings: Json, backend: tokenizers.Tokenizer) -> dict[str, str]:
    """Name -> text of the tokens such as `bos_token`: of tokenizer_config.json, else of special_tokens_map.json."""
    sources = [settings, read_json_if_there(path / "special_tokens_map.json")]
    if "Llama" in str(settings.get("tokenizer_class", "Llama")):
        sources.append({name: text for name, text in _LLAMA_TOKENS.items() if backend.token_to_id(text) is not None})
    found: dict[str, str] = {}
    for source in sources:
        for name, value in source.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str) and name not in found:
                found[name] = text
    return found


def _without_template(settings: Json) -> Json:
    return {name: value for name, value in settings.items() if name != "chat_template"}
