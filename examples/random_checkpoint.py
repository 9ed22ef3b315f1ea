"""Write a small DPN checkpoint with random weights, in the published layout: everything works but the answers.

python examples/random_checkpoint.py OUTPUT_DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dpn_rt.config import (
    BoundaryConfig,
    DecoderConfig,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    PyramidConfig,
    RopeConfig,
    VisionConfig,
)
from dpn_rt.eager import EagerDpn

CORPUS = Path(__file__).parents[1] / "README.md"
KERNELS = ((1, 1), (1, 2), (2, 2))
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<ROUTER>"]


def write_tokenizer(path: Path, vocab_size: int = 1000) -> Tokenizer:
    """A byte-level BPE of the words in the README, in the files that transformers reads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return tokenizer


def model_config(vocab_size: int) -> ModelConfig:
    """Small in width and depth, of full size in visual tokens: 24 x 24 of a 336 pixel image."""
    return ModelConfig(
        dtype="float32",
        decoder=DecoderConfig(
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=704,
            num_layers=8,
            num_heads=4,
            num_kv_heads=4,
            head_dim=64,
            rms_norm_eps=1e-5,
            rope=RopeConfig(10000.0),
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            attention_bias=False,
        ),
        pyramid=PyramidConfig(tuple(BoundaryConfig(layer, KERNELS) for layer in (1, 3, 5)), use_router_token=True),
        prompt=PromptConfig("vicuna_v1", "pad", 1, (2,), None, SPECIAL_TOKENS.index("<ROUTER>"), True, True),
        vision=VisionConfig(128, 256, 4, 2, 336, 14, 1e-5, "quick_gelu", "patch"),
        projector=ProjectorConfig("mlp2x_gelu", 128),
    )


def write_checkpoint(path: Path, seed: int = 0) -> Path:
    """The checkpoint directory: config.json, safetensors, tokenizer files."""
    path.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(path).get_vocab_size()
    torch.manual_seed(seed)
    model = EagerDpn(model_config(vocab_size))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                # Strong routers, so that different pictures take different routes even without training.
                parameter.normal_(0, 8.0 if "predictor" in name else parameter.shape[-1] ** -0.5)
    model.save_checkpoint(path)
    return path


if __name__ == "__main__":
    print(write_checkpoint(Path(sys.argv[1])))
