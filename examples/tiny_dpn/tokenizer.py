"""The tokenizer: byte-level BPE of template and questions, in which small print is spelled character by character."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dpn_rt.prompts.template import VICUNA_SYSTEM
from examples.tiny_dpn.data import QUESTIONS
from examples.tiny_dpn.materials import PHOTOS
from examples.tiny_dpn.scenes import COLORS

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<ROUTER>")
BOS, EOS, ROUTER = 1, 2, 3
VOCAB_SIZE = 512
# Capitals and digits never merge. Otherwise a held-out word could be split into pieces that no training answer has.
_SPELLED = Regex("USER|ASSISTANT|[A-Z]|[0-9]")


def train_tokenizer() -> Tokenizer:
    """Train the tokenizer; every call gives the same one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_SPELLED, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def _corpus() -> list[str]:
    answers = [*COLORS, *PHOTOS, "yes", "no", "left", "right", "top left", "bottom right"]
    turns = [f"{VICUNA_SYSTEM} USER: \n{question} ASSISTANT:" for question in QUESTIONS.values()]
    return [*turns, *(f" {answer}" for answer in answers)] * 2


def write_tokenizer(path: Path) -> list[Path]:
    """Write the files that transformers reads into directory `path`, and return their paths."""
    train_tokenizer().save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return [path / "tokenizer.json", path / "tokenizer_config.json"]
