"""Small real tokenizers, trained when a test needs them and written as the files that transformers reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

Kind = Literal["byte_fallback_bpe", "byte_fallback_unigram", "byte_level_bpe"]
KINDS: tuple[Kind, ...] = ("byte_fallback_bpe", "byte_fallback_unigram", "byte_level_bpe")

SPECIALS = ["<unk>", "<s>", "</s>"]
CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is in the picture? ASSISTANT: A small red boat on a quiet lake, and two birds.",
    "USER: How many people are there? ASSISTANT: There are three people and a dog.",
    "What colour is the car to the left of the house? It is dark blue.",
    "Größe, naïve, façade; 你好世界; привет мир; 1234567890",
]


@dataclass(frozen=True)
class TinyTokenizer:
    """Facts about a tokenizer that tests need."""

    path: Path
    vocab_size: int
    bos_id: int
    eos_id: int
    router_id: int | None
    image_id: int | None


def make_tokenizer(
    path: Path, router: bool = True, image: bool = False, kind: Kind = "byte_fallback_bpe", vocab_size: int = 400
) -> TinyTokenizer:
    """Write `tokenizer.json` and `tokenizer_config.json` to the directory `path` (made if missing).

    Ids 0, 1, 2 are `<unk>`, `<s>`, `</s>` as in LLaMA; a text starts with `<s>`. `<ROUTER>`, then `<image>` come last.

    Args:
        path: the directory.
        router: add the special token `<ROUTER>`.
        image: add the special token `<image>`, as the Hugging Face LLaVA layout has it.
        kind: like LLaMA's (byte_fallback_bpe), like sentencepiece's unigram, or like GPT-2's.
        vocab_size: before the added tokens; 400 and more leave room for merges over the 256 bytes.
    """
    tokenizer = _train(kind, vocab_size)
    added = [*(["<ROUTER>"] if router else []), *(["<image>"] if image else [])]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in added])
    bos_id = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos_id)]
    )
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": added,
        "model_max_length": 2048,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    special_tokens = {name: text for name, text in config.items() if name.endswith("_token")}
    (path / "special_tokens_map.json").write_text(json.dumps(special_tokens))
    return TinyTokenizer(
        path=path,
        vocab_size=tokenizer.get_vocab_size(),
        bos_id=bos_id,
        eos_id=tokenizer.token_to_id("</s>"),
        router_id=tokenizer.token_to_id("<ROUTER>"),
        image_id=tokenizer.token_to_id("<image>"),
    )


def _train(kind: Kind, vocab_size: int) -> Tokenizer:
    if kind == "byte_level_bpe":
        return _byte_level(vocab_size)
    pieces, merges = _trained_pieces(vocab_size - 256)
    ordered = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    if kind == "byte_fallback_bpe":
        vocab = {piece: i for i, piece in enumerate(ordered)}
        tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    else:
        # The library's unigram trainer gives different pieces every time; scores by rank are enough for a test.
        scores = [(piece, -float(i)) for i, piece in enumerate(ordered)]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = _metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return tokenizer


def _byte_level(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _trained_pieces(vocab_size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces in the order of their ids, and merges, over text with visible spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = _metaspace()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIALS), limit_alphabet=70, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(merge) for merge in model["merges"]]


def _metaspace() -> normalizers.Normalizer:
    """LLaMA's: a space before the text, spaces as a visible mark."""
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
