"""What a checkpoint's tokenizer and config.json say about prompts."""

from __future__ import annotations

import itertools
from pathlib import Path

from dpn_rt.builders.chat_template import check_chat_template
from dpn_rt.builders.decoder_config import token_ids
from dpn_rt.builders.json_values import Json, name_of, read_json_if_there
from dpn_rt.builders.layout import Layout, Note
from dpn_rt.builders.tokenizer_files import TokenizerFiles
from dpn_rt.errors import ConfigError
from dpn_rt.format.config import PromptConfig


def prompt_config(
    path: Path, layout: Layout, tokenizer: TokenizerFiles | None, has_image_processor: bool, note: Note
) -> PromptConfig:
    """Special tokens and template of a checkpoint's prompts.

    Args:
        path: of the checkpoint.
        layout: of the checkpoint.
        tokenizer: of the checkpoint; None: it has none.
        has_image_processor: whether the engine carries the image processor's file.
        note: takes a line about what the engine lacks, or what files contradict each other in.

    Raises:
        CheckpointError: the chat template cannot be used.
        ConfigError: ids contradict each other, or the id of `<ROUTER>` is missing.
    """
    generation = read_json_if_there(path / "generation_config.json")
    bos, eos = special_ids(layout, generation, tokenizer, note)
    image_token_id = layout.image_token_id
    if tokenizer is None:
        note("no tokenizer files: the engine takes token ids only")
    else:
        if tokenizer.size > layout.decoder.vocab_size:
            note(
                f"the tokenizer has ids up to {tokenizer.size - 1}, the model embeds {layout.decoder.vocab_size}: "
                "prompts with the ids beyond are refused"
            )
        if tokenizer.image_token_id is not None:
            image_token_id = tokenizer.image_token_id
    template = tokenizer.chat_template if tokenizer and layout.has_own_template else None
    if tokenizer is not None and template is None and layout.has_own_template:
        note("the tokenizer has no chat template: conversations are written as Vicuna's, give prompts as text instead")
    if tokenizer is not None and template is not None:
        image_token = tokenizer.text_of(image_token_id)
        check_chat_template(template, tokenizer.special_tokens, image_token, path, layout.tower is not None)
    return PromptConfig(
        template="vicuna_v1" if template is None else "tokenizer",
        image_aspect_ratio=layout.image_aspect_ratio,
        bos_token_id=bos,
        eos_token_ids=eos,
        image_token_id=image_token_id,
        router_token_id=_router_token_id(layout, tokenizer),
        has_tokenizer=tokenizer is not None,
        has_image_processor=has_image_processor,
    )


def special_ids(
    layout: Layout, generation: Json, tokenizer: TokenizerFiles | None, note: Note
) -> tuple[int | None, tuple[int, ...]]:
    """The id that begins a sequence, and those that end one.

    An answer ends with any id that one of the files names. A sequence begins with the tokenizer's own start token,
    which prompts have; config.json's counts where there is no tokenizer, that of the decoder's part first. What
    transformers takes by default counts where no file names an id.

    Args:
        layout: of the checkpoint.
        generation: generation_config.json.
        tokenizer: of the checkpoint; None: it has none.
        note: takes a line where the files disagree.

    Raises:
        ConfigError: an id is not an integer.
    """
    of_tokenizer = {
        "bos_token_id": None if tokenizer is None else tokenizer.bos_token_id,
        "eos_token_id": None if tokenizer is None else tokenizer.eos_token_id,
    }
    found: dict[str, tuple[int, ...]] = {}
    for key, own in of_tokenizer.items():
        named = {
            "generation_config.json": token_ids(generation, key),
            **{name_of(values, "").rstrip(": ."): token_ids(values, key) for values in layout.token_values},
            "the tokenizer": () if own is None else (own,),
        }
        named = {file: ids for file, ids in named.items() if ids}
        if len({frozenset(ids) for ids in named.values()}) > 1:
            listed = ", ".join(f"{list(ids)} in {file}" for file, ids in named.items())
            note(
                f"{key}: {listed}: "
                + ("each ends an answer" if key == "eos_token_id" else "the last one begins prompts")
            )
        lists = list(named.values()) or [token_ids(layout.token_defaults, key)]
        found[key] = tuple(dict.fromkeys(itertools.chain(*lists))) if key == "eos_token_id" else lists[-1]
    bos = found["bos_token_id"]
    return (bos[0] if bos else None), found["eos_token_id"]


def _router_token_id(layout: Layout, tokenizer: TokenizerFiles | None) -> int | None:
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
