"""The tokenizer files of an engine, and the ids that the builder reads from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer

from dpn_rt.builders.native import build_engine
from dpn_rt.builders.tokenizer_files import read_tokenizer
from dpn_rt.errors import CheckpointError, ConfigError
from dpn_rt.prompts.tokenizer import Tokenizer
from tests.builders.checkpoints import OriginalCheckpoint
from tests.builders.huggingface_checkpoint import edit_config, save_model
from tests.tiny_tokenizer import KINDS, Kind, TinyTokenizer, make_tokenizer


def checkpoint_with_tokenizer(path: Path, **options: Any) -> tuple[OriginalCheckpoint, TinyTokenizer]:
    """A checkpoint whose vocabulary is the tokenizer's, written to `path`."""
    tokenizer = make_tokenizer(path, **options)
    checkpoint = OriginalCheckpoint()
    checkpoint.config["vocab_size"] = tokenizer.vocab_size
    del checkpoint.config["router_token_id"]
    checkpoint.fill().write(path)
    return checkpoint, tokenizer


def test_tokenizer_is_carried_and_names_the_router(tmp_path: Path) -> None:
    _, tokenizer = checkpoint_with_tokenizer(tmp_path / "c", image=True)
    engine = build_engine(tmp_path / "c", tmp_path / "e")
    prompt = engine.model.prompt
    assert (prompt.has_tokenizer, prompt.template, prompt.image_aspect_ratio) == (True, "vicuna_v1", "pad")
    assert (prompt.router_token_id, prompt.image_token_id) == (tokenizer.router_id, tokenizer.image_id)
    loaded = AutoTokenizer.from_pretrained(engine.processor_path, local_files_only=True)
    assert loaded.encode("<ROUTER>")[-1] == tokenizer.router_id


def test_router_id_of_tokenizer_and_config_must_agree(tmp_path: Path) -> None:
    _, tokenizer = checkpoint_with_tokenizer(tmp_path / "c")
    edit_config(tmp_path / "c", router_token_id=5)
    with pytest.raises(
        ConfigError, match=f"router_token_id is 5, but the tokenizer's <ROUTER> is {tokenizer.router_id}"
    ):
        build_engine(tmp_path / "c", tmp_path / "e")
    edit_config(tmp_path / "c", router_token_id=tokenizer.router_id)
    build_engine(tmp_path / "c", tmp_path / "e")


def test_tokenizer_without_router(tmp_path: Path) -> None:
    checkpoint_with_tokenizer(tmp_path / "c", router=False)
    with pytest.raises(ConfigError, match="neither the tokenizer has a <ROUTER> token nor"):
        build_engine(tmp_path / "c", tmp_path / "e")


def test_tokenizer_larger_than_the_vocabulary_is_noted(tmp_path: Path) -> None:
    checkpoint, tokenizer = checkpoint_with_tokenizer(tmp_path / "c", image=True)
    checkpoint.config["vocab_size"] -= 1  # as where <image> was added without an embedding
    checkpoint.fill().write(tmp_path / "c")
    notes: list[str] = []
    build_engine(tmp_path / "c", tmp_path / "e", note=notes.append)
    assert any(f"ids up to {tokenizer.vocab_size - 1}, the model embeds {tokenizer.vocab_size - 1}" in n for n in notes)


def test_damaged_tokenizer(tmp_path: Path) -> None:
    checkpoint_with_tokenizer(tmp_path / "c")
    (tmp_path / "c" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: damaged, or written by a newer version"):
        build_engine(tmp_path / "c", tmp_path / "e")


def test_tokenizer_without_a_class(tmp_path: Path) -> None:
    _, tokenizer = checkpoint_with_tokenizer(tmp_path / "c")
    settings = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (tmp_path / "c" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert build_engine(tmp_path / "c", tmp_path / "e").model.prompt.router_token_id == tokenizer.router_id


@pytest.mark.parametrize(
    ("config", "generation", "eos", "noted"),
    [
        ({}, None, (2,), []),
        ({"eos_token_id": 2, "bos_token_id": 1}, {"eos_token_id": 2}, (2,), []),
        ({"eos_token_id": 0}, None, (0, 2), ["eos_token_id: [0] in config.json, [2] in the tokenizer: each"]),
        ({"eos_token_id": None}, {"eos_token_id": [0, 5]}, (0, 5, 2), ["[0, 5] in generation_config.json, [2]"]),
        ({"eos_token_id": 7}, {"eos_token_id": [5, 6, 5], "bos_token_id": 4}, (5, 6, 7, 2), ["eos_token_id", "bos"]),
        ({"bos_token_id": 3}, None, (2,), ["bos_token_id: [3] in config.json, [1] in the tokenizer: the last one"]),
    ],
)
def test_ids_that_end_an_answer_are_those_of_all_files(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, eos: tuple[int, ...], noted: list[str]
) -> None:
    checkpoint, tokenizer = checkpoint_with_tokenizer(tmp_path / "c")
    for key in ("bos_token_id", "eos_token_id"):
        del checkpoint.config[key]
    checkpoint.config.update(config)
    checkpoint.write(tmp_path / "c")
    if generation is not None:
        (tmp_path / "c" / "generation_config.json").write_text(json.dumps(generation))
    notes: list[str] = []
    prompt = build_engine(tmp_path / "c", tmp_path / "e", note=notes.append).model.prompt
    assert (prompt.bos_token_id, prompt.eos_token_ids) == (tokenizer.bos_id, eos)
    notes = [note for note in notes if "eos_token_id" in note or "bos_token_id" in note]
    assert len(notes) == len(noted) and all(any(part in note for note in notes) for part in noted)


@pytest.mark.parametrize(
    ("top", "text", "generation", "eos", "noted"),
    [
        ({}, {}, None, (2,), []),
        ({"eos_token_id": 7, "bos_token_id": 1}, {}, None, (7, 2), ["[7] in config.json, [2] in the tokenizer: each"]),
        ({"eos_token_id": [2, 8]}, {}, None, (2, 8), ["[2, 8] in config.json, [2] in the tokenizer: each"]),
        ({}, {"eos_token_id": 9}, None, (9, 2), ["[9] in config.json: text_config, [2] in the tokenizer: each"]),
        (
            {"eos_token_id": 7},
            {"eos_token_id": 9},
            {"eos_token_id": [5]},
            (5, 7, 9, 2),
            ["[5] in generation_config.json, [7] in config.json, [9] in config.json: text_config, [2] in the to"],
        ),
        ({"bos_token_id": 3}, {}, None, (2,), ["bos_token_id: [3] in config.json, [1] in the tokenizer: the last"]),
        (
            {"bos_token_id": 3},
            {"bos_token_id": 4},
            None,
            (2,),
            ["bos_token_id: [3] in config.json, [4] in config.json: text_config, [1] in the tokenizer: the last"],
        ),
        ({"pad_token_id": 5}, {"pad_token_id": 6}, {"pad_token_id": 0}, (2,), []),
        ({"pad_token_id": 2}, {}, None, (2,), []),
        ({"pad_token_id": 7, "eos_token_id": 7}, {}, None, (7, 2), ["[7] in config.json, [2] in the tokenizer: each"]),
    ],
)
def test_ids_of_every_part_of_the_hugging_face_layout(
    tmp_path: Path,
    top: dict[str, Any],
    text: dict[str, Any],
    generation: dict[str, Any] | None,
    eos: tuple[int, ...],
    noted: list[str],
) -> None:
    """The ids that fill up batches (pad) end no answer, wherever they stand, unless they are one that does."""
    path = tmp_path / "c"
    save_model(path)
    make_tokenizer(path, image=True)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<unk>"}))
    config = json.loads((path / "config.json").read_text())
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    config = {key: value for key, value in config.items() if key not in ids}
    own = {key: value for key, value in config["text_config"].items() if key not in ids}
    (path / "config.json").write_text(json.dumps({**config, **top, "text_config": {**own, **text}}))
    (path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    notes: list[str] = []
    prompt = build_engine(path, tmp_path / "e", note=notes.append).model.prompt
    assert (prompt.bos_token_id, prompt.eos_token_ids) == (1, eos)
    notes = [note for note in notes if "eos_token_id" in note or "bos_token_id" in note]
    assert len(notes) == len(noted) and all(any(part in note for note in notes) for part in noted)


@pytest.mark.parametrize(
    ("top", "text", "expected"),
    [
        ({}, {}, (1, (2,))),  # transformers' defaults for this family
        ({"eos_token_id": 7}, {}, (1, (7,))),  # a default ends no answer where a file names another id
        ({"bos_token_id": 3, "eos_token_id": 7}, {"bos_token_id": 4, "eos_token_id": 8}, (4, (7, 8))),
        ({}, {"bos_token_id": None, "eos_token_id": None}, (None, ())),
    ],
)
def test_ids_of_the_hugging_face_layout_without_tokenizer(
    tmp_path: Path, top: dict[str, Any], text: dict[str, Any], expected: tuple[int | None, tuple[int, ...]]
) -> None:
    save_model(tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    own = {key: value for key, value in config["text_config"].items() if not key.endswith("token_id")}
    edit_config(tmp_path / "c", **{"bos_token_id": None, "eos_token_id": None, **top}, text_config={**own, **text})
    (tmp_path / "c" / "generation_config.json").unlink(missing_ok=True)
    prompt = build_engine(tmp_path / "c", tmp_path / "e").model.prompt
    assert (prompt.bos_token_id, prompt.eos_token_ids) == expected


def test_ids_of_an_engine_without_tokenizer(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.config.update(bos_token_id=3, eos_token_id=[4, 4])
    checkpoint.write(tmp_path / "c")
    (tmp_path / "c" / "generation_config.json").write_text('{"eos_token_id": 6}')
    prompt = build_engine(tmp_path / "c", tmp_path / "e").model.prompt
    assert (prompt.bos_token_id, prompt.eos_token_ids) == (3, (6, 4))


@pytest.mark.parametrize(
    "name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "GPT2Tokenizer", None]
)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_tokenizer_json(tmp_path: Path, name: str | None, kind: Kind) -> None:
    """Classes of transformers replace the normaliser and more; the file counts."""
    make_tokenizer(tmp_path / "c", kind=kind)
    settings = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())
    settings.update(legacy=False, add_prefix_space=False, add_bos_token=False, tokenizer_class=name)
    (tmp_path / "c" / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in settings.items() if v is not None})
    )
    files = read_tokenizer(tmp_path / "c", print)
    assert files is not None
    (tmp_path / "e").mkdir()
    for file, content in files.files.items():
        (tmp_path / "e" / file).write_bytes(content)
    expected = tokenizers.Tokenizer.from_file(str(tmp_path / "c" / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path / "e")
    for text in ("Hello world", " a", "x<ROUTER> ASSISTANT: b", "  two", "</s>USER: ñ😀", "<ROUTER>a", ""):
        assert ours.encode(text) == expected.encode(text).ids
        assert ours.decode(ours.encode(text), False) == expected.decode(expected.encode(text).ids, False)


def test_tokens_that_only_other_files_have(tmp_path: Path) -> None:
    tiny = make_tokenizer(tmp_path, router=False)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<ROUTER>": tiny.vocab_size, "</s>": 2}))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings["added_tokens_decoder"] = {str(tiny.vocab_size + 1): {"content": "<image>", **flags}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    notes: list[str] = []
    files = read_tokenizer(tmp_path, notes.append)
    assert files is not None and not notes
    assert (files.router_token_id, files.image_token_id) == (tiny.vocab_size, tiny.vocab_size + 1)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<ROUTER>": tiny.vocab_size, "</s>": 9}))
    read_tokenizer(tmp_path, notes.append)
    assert notes == ["the token '</s>' has the id 9, but 2 in tokenizer.json, which is used"]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<ROUTER>": tiny.vocab_size + 7}))
    with pytest.raises(CheckpointError, match="'<image>' has the id 401, which is not the next one"):
        read_tokenizer(tmp_path, notes.append)


def test_nothing_else_is_carried(tmp_path: Path) -> None:
    checkpoint_with_tokenizer(tmp_path / "c")
    (tmp_path / "c" / "tokenization_custom.py").write_text("raise SystemExit")
    (tmp_path / "c" / "training_args.bin").write_bytes(b"x")
    engine = build_engine(tmp_path / "c", tmp_path / "e")
    carried = sorted(file.name for file in engine.processor_path.iterdir())
    assert carried == [
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
