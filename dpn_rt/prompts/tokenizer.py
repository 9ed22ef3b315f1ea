"""The tokenizer of an engine: text -> ids with the image placeholder, and ids -> text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import tokenizers

from dpn_rt.errors import EngineError
from dpn_rt.format.config import IMAGE_PLACEHOLDER_ID
from dpn_rt.prompts.markers import IMAGE_TEXT, Typed
from dpn_rt.schema.files import SETTINGS_BYTES, VOCABULARY_BYTES, is_there, read_text
from dpn_rt.schema.json_text import read_json
from dpn_rt.schema.text import shown

WORD_START = "▁"
"""The character for a space in vocabularies of sentencepiece."""


LONG = 2**12
"""Characters or ids. At least so many are encoded or decoded as a batch of one, during which other threads run: the
library keeps Python's lock otherwise, for seconds where a text has a million characters."""


def _byte_characters() -> dict[str, int]:
    """The character by which GPT-2 represents a byte -> the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_characters()


class Tokenizer:
    """`tokenizer.json` as the tokenizers library reads it, with the functions that prompts and streams need."""

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> None:
        """
        Args:
            backend: of the tokenizers library.
            special_tokens: names such as `bos_token` -> text.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend, self.special_tokens = backend, dict(special_tokens)
        bos = self.special_tokens.get("bos_token")
        self.bos_token_id: int | None = None if bos is None else backend.token_to_id(bos)
        """Id of the start token; None where the tokenizer has none."""
        self._copy: _Renamed | None = None

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """The tokenizer of an engine, from `tokenizer.json` and `special_tokens_map.json`.

        Raises:
            EngineError: a file is missing or cannot be read.
        """
        file = directory / "tokenizer.json"
        text = read_text(file, EngineError, VOCABULARY_BYTES) if is_there(file) else ""
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception
            raise EngineError(f"{file}: missing, or no tokenizer: build the engine again") from error
        path = directory / "special_tokens_map.json"
        special_tokens = read_json(path, EngineError, SETTINGS_BYTES) if is_there(path) else {}
        if not isinstance(special_tokens, dict) or not all(isinstance(text, str) for text in special_tokens.values()):
            raise EngineError(f"{path}: {shown(special_tokens)}, expected an object of texts: build the engine again")
        return cls(backend, special_tokens)

    def encode(self, text: str, image_token_id: int | None = None) -> list[int]:
        """Token ids of a prompt, with one placeholder id for each `<image>`.

        If the tokenizer has no image token, the pieces of text around `<image>` are tokenised separately, as in LLaVA.
        Its models were trained on that, and a tokenizer that starts every text with a space gives other ids otherwise.

        Args:
            text: the prompt; special tokens in it are recognised.
            image_token_id: id of the tokenizer's image token; None where it has none.
        """
        image_token = None if image_token_id is None else self.token(image_token_id)
        if image_token is None:
            return self._single_bos(self._joined([self._ids(piece) for piece in text.split(IMAGE_TEXT)]))
        ids = self._ids(text.replace(IMAGE_TEXT, image_token))
        return self._single_bos([IMAGE_PLACEHOLDER_ID if token_id == image_token_id else token_id for token_id in ids])

    def marker_texts(self, *token_ids: int | None) -> list[str]:
        """What must not be confused with the same characters in a text: special tokens, these tokens, `<image>`."""
        tokens = [self.token(token_id) for token_id in (*self._special_ids, *token_ids) if token_id is not None]
        return [IMAGE_TEXT, *(token for token in tokens if token)]

    def encode_typed(self, text: str, typed: Typed, image_token_id: int | None = None) -> list[int]:
        """As `encode`, of a text in which stand-ins are to become the plain characters of special tokens.

        The special tokens of the text get other names, and so does a copy of the tokenizer. In that copy their old
        names mean nothing, and the stand-ins can be replaced by them.

        Args:
            text: the prompt.
            typed: the stand-ins in it.
            image_token_id: as in `encode`.
        """
        renamed = typed.renamed
        image_text = (None if image_token_id is None else self.token(image_token_id)) or IMAGE_TEXT
        marked = typed.show(typed.mark(text.replace(IMAGE_TEXT, image_text)))
        copy = self._renamed_copy(typed)
        if image_token_id is None:
            return self._single_bos(self._joined([copy.ids(piece) for piece in marked.split(renamed[IMAGE_TEXT])]))
        ids = copy.ids(marked)
        return self._single_bos([IMAGE_PLACEHOLDER_ID if token_id == image_token_id else token_id for token_id in ids])

    def _renamed_copy(self, typed: Typed) -> _Renamed:
        """Kept, since making it takes a few tenths of a second and the names are nearly always the same."""
        copy = self._copy
        if copy is None or copy.names != typed.renamed:
            copy = self._copy = _Renamed(self._backend, typed.renamed)
        return copy

    def _ids(self, text: str) -> list[int]:
        return _encoded(self._backend, text)

    def _joined(self, pieces: list[list[int]]) -> list[int]:
        """Pieces around images, each of which may begin with the start token; it is kept in the first one alone."""
        result = list(pieces[0])
        for piece in pieces[1:]:
            starts_text = bool(piece) and piece[0] == self.bos_token_id
            result += [IMAGE_PLACEHOLDER_ID, *(piece[1:] if starts_text else piece)]
        return result

    def _single_bos(self, ids: list[int]) -> list[int]:
        """Ids with one start token, where a chat template has added a second one."""
        bos = self.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """Text of token ids, with all its spaces."""
        if len(token_ids) < LONG:
            return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return self._backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]

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
        return max(map(len, self._backend.get_vocab()))

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry for an id; None for ids after its end, where embeddings are often padded."""
        return self._backend.id_to_token(token_id)

    def has_text(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether decoding takes the id into account."""
        return self.token(token_id) is not None and not (skip_special_tokens and token_id in self._special_ids)

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of byte-fallback tokens, `<0x00>` to `<0xFF>`."""
        ids = [self._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        return frozenset(token_id for token_id in ids if token_id is not None)

    @cached_property
    def _is_byte_level(self) -> bool:
        """Whether the vocabulary's characters stand for bytes, as in GPT-2."""
        return '"ByteLevel"' in json.dumps(json.loads(self._backend.to_str())["decoder"])

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)


class _Renamed:
    """A copy of a tokenizer in which some added tokens have other texts."""

    def __init__(self, backend: tokenizers.Tokenizer, names: Mapping[str, str]) -> None:
        """Args: names: old text -> new text, where the old one is an added token's."""
        self.names = dict(names)
        settings = json.loads(backend.to_str())
        added = settings["added_tokens"]
        new_text = {token["content"]: names.get(token["content"], token["content"]) for token in added}
        settings["added_tokens"] = [{**token, "content": new_text[token["content"]]} for token in added]
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(settings))
        # A new text is not in the vocabulary: its token has got an id after all others.
        copy_ids, ids = self._backend.get_vocab(), backend.get_vocab()
        self._original_id = {copy_ids[new]: ids[old] for old, new in new_text.items()}

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, as the original numbers them."""
        ids = _encoded(self._backend, text)
        return [self._original_id.get(token_id, token_id) for token_id in ids]


def _encoded(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    return backend.encode(text).ids if len(text) < LONG else backend.encode_batch([text])[0].ids
