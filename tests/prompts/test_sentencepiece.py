"""Tokenizers as original LLaVA checkpoints have them: a sentencepiece model, converted when the engine is built."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from dpn_rt.builders.tokenizer_files import read_tokenizer
from dpn_rt.engine.detokenizer import Detokenizer
from dpn_rt.prompts.tokenizer import Tokenizer
from dpn_rt.sampling.params import SamplingParams
from tests.tiny_tokenizer import CORPUS

ROUTER_ID = 420
SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<ROUTER>": ROUTER_ID}
PARTS = ["<ROUTER>", " ASSISTANT:", "USER: ", "</s>", "  ", "\n", "What is", "ñ😀", "a"]


@pytest.fixture(scope="module")
def model() -> bytes:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=ROUTER_ID,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pieces(model: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module", params=[True, None], ids=["legacy", "unsaid"])
def tokenizer(model: bytes, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("sentencepiece")
    (path / "tokenizer.model").write_bytes(model)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": {str(i): {"content": text, **flags} for text, i in SPECIALS.items()},
        "additional_special_tokens": ["<ROUTER>"],
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    if request.param is not None:
        config["legacy"] = request.param
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    files = read_tokenizer(path, print)
    assert files is not None
    for name, content in files.files.items():
        (path / name).write_bytes(content)
    return Tokenizer.load(path)


@settings(max_examples=100, deadline=None)
@given(text=st.lists(st.sampled_from(PARTS), min_size=1, max_size=8).map("".join))
def test_every_text_between_special_tokens_is_sentencepieces_own(tokenizer: Tokenizer, pieces: Any, text: str) -> None:
    expected = [1]
    for piece in re.split(r"(<ROUTER>|</s>)", text):
        expected += [SPECIALS[piece]] if piece in SPECIALS else pieces.encode(piece)
    assert tokenizer.encode(text) == expected


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 425), st.integers(3, 258)), max_size=60), skip=st.booleans())
def test_deltas_join_to_the_decoding(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(tokenizer, SamplingParams(skip_special_tokens=skip))
    deltas = []
    for token_id in ids:
        detokenizer.append(token_id)
        deltas.append(detokenizer.take())
    detokenizer.finish()
    assert "".join([*deltas, detokenizer.take()]) == tokenizer.decode(ids, skip)
