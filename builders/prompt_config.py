"""What a checkpoint's tokenizer and config.json say about prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dpn_rt.builders.json_values import read_json
from dpn_rt.builders.layout import Layout, Note
from dpn_rt.builders.llama_config import token_ids
from dpn_rt.builders.tokenizer_files import TokenizerFacts, read_tokenizer
from dpn_rt.errors import ConfigError
from dpn_rt.format.config import PromptConfig


def prompt_config(
    path: Path, layout: Layout, files: Mapping[str, bytes], has_image_processor: bool, note: Note
) -> PromptConfig:
    """Special tokens and template of a checkpoint's prompts.

    Args:
        path: of the checkpoint.
        layout: of the checkpoint.
        files: of its tokenizer, by name; may be empty.
        has_image_processor: whether the engine carries the image processor's file.
        note: takes a line about what the engine lacks.

    Raises:
        CheckpointError: the tokenizer's files cannot be loaded.
        ConfigError: ids contradict each other, or the id of `<ROUTER>` is missing.
    """
    generation = read_json(path / "generation_config.json") if (path / "generation_config.json").is_file() else {}
    bos, eos = token_ids(layout.token_values, generation)
    tokenizer = read_tokenizer(path, files) if files else None
    image_token_id = layout.image_token_id
    if tokenizer is not None:
        bos = tokenizer.bos_token_id if bos is None else bos
        eos = eos or (() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
        if tokenizer.size > layout.decoder.vocab_size:
            note(
                f"the tokenizer has ids up to {tokenizer.size - 1}, the model embeds {layout.decoder.vocab_size}: "
                "prompts with the ids beyond are refused"
            )
        if tokenizer.image_token_id is not None:
            image_token_id = tokenizer.image_token_id
    else:
        note("no tokenizer files: the engine takes token ids only")
    has_template = tokenizer is not None and tokenizer.has_chat_template and layout.kind == "huggingface"
    return PromptConfig(
        template="tokenizer" if has_template else "vicuna_v1",
        image_aspect_ratio=layout.image_aspect_ratio,
        bos_token_id=bos,
        eos_token_ids=eos,
        image_token_id=image_token_id,
        router_token_id=_router_token_id(layout, tokenizer),
        has_tokenizer=tokenizer is not None,
        has_image_processor=has_image_processor,
    )


def _router_token_id(layout: Layout, tokenizer: TokenizerFacts | None) -> int | None:
    """The id of `<ROUTER>` for a model that uses it; a tokenizer and config.json that both name one must agree."""
    if not layout.reduction.use_router_token:
        return None
    of_tokenizer = tokenizer.router_token_id if tokenizer else None
    if of_tokenizer is not None and layout.router_token_id not in (None, of_tokenizer):
        raise ConfigError(
            f"config.json: router_token_id is {layout.router_token_id}, but the tokenizer's <ROUTER> is {of_tokenizer}"
        )
    found = layout.router_token_id if of_tokenizer is None else of_tokenizer
    if found is None and layout.reduction.reads_router_rows:
        raise ConfigError(
            "use_special_token is set, but neither the tokenizer has a <ROUTER> token nor config.json a router_token_id"
        )
    return found
