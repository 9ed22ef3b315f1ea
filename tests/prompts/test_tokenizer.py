"""Texts of single tokens, and the largest length of a text."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpn_rt.prompts.tokenizer import Tokenizer
from tests.tiny_tokenizer import KINDS, Kind, make_tokenizer

TEXTS = ["Hello world, how are you?", "  two  spaces ", "Größe 猫 naïve", "a<ROUTER>b", "\U0001f600 x", "1"]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    kind: Kind = request.param
    make_tokenizer(tmp_path, kind=kind)
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_make_up_their_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)[1:]  # after <s>
    together = b"".join(map(tokenizer.token_bytes, ids)).decode()
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    assert together[tokenizer.num_stripped(ids[0]) :] == decoded


def test_no_two_byte_tokens_are_the_same(tokenizer: Tokenizer) -> None:
    alone = [tokenizer.token_bytes(token_id) for token_id in tokenizer.byte_ids]
    assert sorted(alone) == [bytes([byte]) for byte in range(len(alone))]


def test_special_tokens_and_ids_beyond_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_text(token_id) for token_id in (0, 1, 2)] == ["<unk>", "<s>", "</s>"]
    assert tokenizer.token_bytes(10**6) == b""


def test_no_token_stands_for_more_characters_than_the_longest_entry(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert len(text) <= len(tokenizer.encode(text)) * tokenizer.longest_entry
