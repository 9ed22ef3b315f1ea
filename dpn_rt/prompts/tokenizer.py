"""The tokenizer of an engine: text -> ids with the image placeholder, and ids -> text."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import normalizers, pre_tokenizers

from dpn_rt.errors import EngineError
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID

IMAGE_TEXT = "<image>"
"""The placeholder of an image in a prompt string, whatever image token the tokenizer has."""
WORD_START = "▁"
"""The character for a space in vocabularies of sentencepiece."""


def _byte_characters() -> dict[str, int]:
    """The character by which GPT-2 represents a byte -> the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_characters()


class Tokenizer:
    """A Hugging Face tokenizer with the functions that prompts and streams need."""

    def __init__(self, tokenizer: Any) -> None:
        """Args: tokenizer: of transformers."""
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """The tokenizer whose files are in `directory`. Nothing is downloaded, and no code from the directory runs.

        Raises:
            EngineError: the files are missing or cannot be read.
        """
        from transformers import AutoTokenizer

        converted = (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file()
        try:
            settings = _settings(directory) if converted else {}
            # True is LLaMA's default. transformers 5 does not apply it to a sentencepiece model without this setting.
            options = {"add_bos_token": settings.get("add_bos_token", True)} if converted else {}
            tokenizer = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, **options
            )
        except Exception as error:  # transformers and tokenizers raise anything from OSError to bare Exception
            raise EngineError(f"{directory}: cannot load the tokenizer: {error}") from error
        has_legacy_spaces = settings.get("legacy") is not False and settings.get("add_prefix_space") is not False
        if converted and has_legacy_spaces:
            _restore_legacy_spaces(tokenizer)
        return cls(tokenizer)

    def encode(self, text: str, image_token_id: int | None = None) -> list[int]:
        """Token ids of a prompt, with one placeholder id for each `<image>`.

        If the tokenizer has no image token, the pieces of text around `<image>` are tokenised separately, as in LLaVA.
        Its models were trained on that, and a tokenizer that starts every text with a space gives other ids otherwise.

        Args:
            text: the prompt; special tokens in it are recognised.
            image_token_id: id of the tokenizer's image token; None where it has none.
        """
        image_token = None if image_token_id is None else self.token(image_token_id)
        if image_token is not None:
            ids = self._ids(text.replace(IMAGE_TEXT, image_token))
            return self._single_bos(
                [IMAGE_PLACEHOLDER_ID if token_id == image_token_id else token_id for token_id in ids]
            )
        first, *others = (self._ids(piece) for piece in text.split(IMAGE_TEXT))
        result = first
        for piece in others:
            starts_text = bool(piece) and piece[0] == self.bos_token_id
            result = [*result, IMAGE_PLACEHOLDER_ID, *(piece[1:] if starts_text else piece)]
        return self._single_bos(result)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, verbose=False).input_ids)

    def _single_bos(self, ids: list[int]) -> list[int]:
        """Ids with one start token, where a chat template has added a second one."""
        bos = self.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """Text of token ids, with all its spaces."""
        if self._backend is not None:
            return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))
        known = [token_id for token_id in token_ids if self.token(token_id) is not None]
        text = self._tokenizer.decode(
            known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that one token adds to a text. They may be only a part of a character."""
        entry = self.token(token_id)
        if entry is None:
            return b""
        if token_id in self._added_ids:
            return entry.encode()
        if token_id in self.byte_ids:
            return bytes([int(entry[3:5], 16)])
        if self._is_byte_level:
            return b"".join(bytes([BYTE_OF[c]]) if c in BYTE_OF else c.encode() for c in entry)
        return entry.replace(WORD_START, " ").encode()

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself, with U+FFFD for incomplete characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def num_stripped(self, first_id: int) -> int:
        """Number of leading spaces that a token loses when it is the first one of a text."""
        text = self.token_text(first_id)
        return len(text) - len(text.lstrip(" ")) if not self.decode([first_id], False).startswith(" ") else 0

    @cached_property
    def longest_entry(self) -> int:
        """Length of the vocabulary's longest entry in characters."""
        vocabulary = self._tokenizer.get_vocab() if self._backend is None else self._backend.get_vocab()
        return max(map(len, vocabulary))

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry for an id; None for ids after its end, where embeddings are often padded."""
        if self._backend is not None:
            entry = self._backend.id_to_token(token_id)
        else:
            entry = self._tokenizer.convert_ids_to_tokens(token_id) if token_id < len(self._tokenizer) else None
        return None if entry is None else str(entry)

    def has_text(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether decoding takes the id into account."""
        return self.token(token_id) is not None and not (skip_special_tokens and token_id in self._special_ids)

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of byte-fallback tokens, `<0x00>` to `<0xFF>`."""
        entries = [f"<0x{byte:02X}>" for byte in range(256)]
        if self._backend is not None:
            ids = [self._backend.token_to_id(entry) for entry in entries]
        else:
            vocabulary = self._tokenizer.get_vocab()
            ids = [vocabulary.get(entry) for entry in entries]
        return frozenset(token_id for token_id in ids if token_id is not None)

    @cached_property
    def _is_byte_level(self) -> bool:
        """Whether the vocabulary's characters stand for bytes, as in GPT-2."""
        return self._backend is not None and '"ByteLevel"' in json.dumps(json.loads(self._backend.to_str())["decoder"])

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        if self._backend is None:
            return frozenset(self._tokenizer.get_added_vocab().values())
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        if self._backend is None:
            return frozenset(self._tokenizer.all_special_ids)
        return frozenset(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the start token; None where the tokenizer has none."""
        token_id: int | None = self._tokenizer.bos_token_id
        return token_id

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that makes a prompt of messages; None where the tokenizer has none."""
        template = getattr(self._tokenizer, "chat_template", None)
        return template if isinstance(template, str) else None

    def apply_chat_template(self, messages: list[dict[str, Any]]) -> str:
        """The prompt that the chat template makes of messages. It ends where the assistant's answer begins."""
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text)


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _restore_legacy_spaces(tokenizer: Any) -> None:
    """Makes a "legacy" sentencepiece model start every piece of text between special tokens with a space.

    LLaVA's models were trained with this space, and transformers 4 still adds it. transformers 5 leaves it out where
    the text already starts with one, as in `<ROUTER> ASSISTANT:`, which gives other ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
