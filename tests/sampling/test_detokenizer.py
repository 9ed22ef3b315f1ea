"""Streams: deltas join to the full decoding, stop strings may span tokens, and no character is partial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dpn_rt.engine.detokenizer import Detokenizer
from dpn_rt.prompts.tokenizer import Tokenizer
from dpn_rt.sampling.params import SamplingParams
from tests.tiny_tokenizer import KINDS, TinyTokenizer, make_tokenizer

TEXTS = [
    "It is a red boat.",
    "  two  spaces\n\n",
    "你好, Größe 😀😀!",
    "</s> naïve <ROUTER>x",
    "👩‍👩‍👧 \N{REPLACEMENT CHARACTER}",
    "\n",
]


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: Any, tmp_path_factory: pytest.TempPathFactory) -> TinyTokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), kind=request.param)


@pytest.fixture(scope="module")
def tokenizer(tiny: TinyTokenizer) -> Tokenizer:
    return Tokenizer.load(tiny.path)


def decoded(tiny: TinyTokenizer, ids: list[int], skip: bool) -> str:
    """What transformers makes of ids."""
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tiny.path / "tokenizer.json"))
    return str(theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))


def stream(tokenizer: Tokenizer, ids: list[int], params: SamplingParams) -> tuple[list[str], str, str | None]:
    detokenizer = Detokenizer(tokenizer, params)
    deltas, stop = [], None
    for token_id in ids:
        stop = detokenizer.append(token_id)
        if stop is not None:
            break
        deltas.append(detokenizer.take())
    detokenizer.finish()
    deltas.append(detokenizer.take())
    return deltas, detokenizer.text, stop


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), skip=st.booleans())
def test_deltas_of_any_ids_join_to_the_decoding(
    tokenizer: Tokenizer, tiny: TinyTokenizer, data: st.DataObject, skip: bool
) -> None:
    # Beyond the vocabulary: padded embeddings can produce such ids.
    common = st.integers(0, tiny.vocab_size + 5)
    some_bytes = st.integers(3, 258)
    ids = data.draw(st.lists(st.one_of(common, some_bytes), max_size=80))
    deltas, text, _ = stream(tokenizer, ids, SamplingParams(skip_special_tokens=skip))
    assert text == decoded(tiny, ids, skip)
    assert "".join(deltas) == text


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.text(max_size=60), st.lists(st.sampled_from(TEXTS), max_size=12).map("".join)))
def test_deltas_of_text_hold_whole_characters(tokenizer: Tokenizer, tiny: TinyTokenizer, text: str) -> None:
    ids = tokenizer._ids(text)
    deltas, streamed, _ = stream(tokenizer, ids, SamplingParams())
    assert streamed == decoded(tiny, ids, True)
    assert "".join(deltas) == streamed
    if "\N{REPLACEMENT CHARACTER}" not in streamed:
        assert not any("\N{REPLACEMENT CHARACTER}" in delta for delta in deltas)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), include=st.booleans())
def test_a_stop_string_ends_the_text_where_it_first_appears(
    tokenizer: Tokenizer, data: st.DataObject, include: bool
) -> None:
    text = data.draw(st.text(alphabet="ab \n你", min_size=1, max_size=40))
    stops = data.draw(st.lists(st.text(alphabet="ab \n你", min_size=1, max_size=4), min_size=1, max_size=3))
    ids = tokenizer._ids(text)
    full = tokenizer.decode(ids, True)
    deltas, streamed, stop = stream(tokenizer, ids, SamplingParams(stop=stops, include_stop_str_in_output=include))
    assert "".join(deltas) == streamed
    if not any(item in full for item in stops):
        assert (stop, streamed) == (None, full)
        return
    assert stop is not None
    end = streamed + ("" if include else stop)
    assert full.startswith(end)
    # No other stop string was complete before the one that was found.
    assert not any(item in end[:-1] and full.find(item) < full.find(stop) for item in stops)
    assert include or not any(item in streamed for item in stops if len(item) <= len(stop))


def test_a_partial_stop_string_is_held_until_it_is_ruled_out(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop="xyz"))
    seen = ""
    for token_id in tokenizer._ids("a b xy")[1:]:
        assert detokenizer.append(token_id) is None
        seen += detokenizer.take()
    assert seen == "a b "
    for token_id in tokenizer._ids("qq")[1:]:
        detokenizer.append(token_id)
        seen += detokenizer.take()
    detokenizer.finish()
    assert seen + detokenizer.take() == detokenizer.text
    assert detokenizer.text.startswith("a b xy")


def test_no_stop_string_before_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer._ids("a a a a a a a a")[1:]
    _, text, stop = stream(tokenizer, ids, SamplingParams(stop="a", min_tokens=5, max_tokens=50))
    assert stop == "a"
    assert text.count("a") >= 2
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop="a", min_tokens=5, max_tokens=50))
    assert [detokenizer.append(token_id) for token_id in ids[:5]] == [None] * 5


def test_a_newline_stop_is_seen_at_once(tokenizer: Tokenizer) -> None:
    """In LLaMA's vocabulary a newline is a byte token, which is otherwise held back until the run of bytes ends."""
    ids = tokenizer._ids("yes\n")
    deltas, text, stop = stream(tokenizer, ids, SamplingParams(stop="\n"))
    assert stop == "\n"
    assert text == "".join(deltas) == "yes"


def test_special_tokens_are_left_out_or_kept(tokenizer: Tokenizer, tiny: TinyTokenizer) -> None:
    ids = [*tokenizer._ids("yes"), tiny.eos_id]
    assert stream(tokenizer, ids, SamplingParams())[1] == "yes"
    assert stream(tokenizer, ids, SamplingParams(skip_special_tokens=False))[1].endswith("yes</s>")


def test_tokenizer_files_are_named_when_they_are_broken(tmp_path: Path) -> None:
    from dpn_rt.errors import EngineError

    for content in (None, "{", "{}"):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(EngineError, match=r"tokenizer.json: missing, or no tokenizer: build the engine again"):
            Tokenizer.load(tmp_path)
