"""Texts of single tokens, and the largest length of a text."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from dpn_rt.prompts.markers import Typed
from dpn_rt.prompts.tokenizer import LONG, Tokenizer
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


@pytest.mark.parametrize("text", [*TEXTS, " ", "a\u0301"])
@pytest.mark.parametrize("length", [LONG - 1, LONG, LONG + 1])
def test_long_texts_are_like_short_ones(tokenizer: Tokenizer, tmp_path: Path, text: str, length: int) -> None:
    backend = tokenizers.Tokenizer.from_str((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    long = (text * length)[:length]
    ids = backend.encode(long).ids
    assert tokenizer.encode(long) == ids
    many = (ids * length)[:length]
    for skips in (True, False):
        assert tokenizer.decode(many, skips) == backend.decode(many, skip_special_tokens=skips)


def turns_of_others(work: Callable[[], object]) -> int:
    """How often another thread ran during some work."""
    has_begun, has_ended, count = threading.Event(), threading.Event(), 0

    def run() -> None:
        nonlocal count
        has_begun.set()
        while not has_ended.wait(0.001):
            count += 1

    other = threading.Thread(target=run)
    other.start()
    has_begun.wait()
    work()
    has_ended.set()
    other.join()
    return count


@pytest.mark.parametrize("character", ["a", " ", "\u0301", "\U0001f600", "\ufdfa", "\0", "<"])
def test_other_threads_run_while_a_long_text_is_taken(tokenizer: Tokenizer, character: str) -> None:
    text = character * 2**16
    assert turns_of_others(lambda: tokenizer.encode(text)) > 3
    typed = Typed.of(tokenizer.marker_texts(None), ["<s>"])
    assert typed is not None
    assert turns_of_others(lambda: tokenizer.encode_typed(text, typed)) > 3
    assert turns_of_others(lambda: tokenizer.decode([9] * 2**18, False)) > 3
