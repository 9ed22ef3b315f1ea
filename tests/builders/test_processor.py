"""The tokenizer and image processor files of an engine, and the values that the builder reads from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPImageProcessor

from dpn_rt.builders.native import build_engine
from dpn_rt.builders.tokenizer_files import read_tokenizer
from dpn_rt.engine.loader import load_processor
from dpn_rt.errors import CheckpointError, ConfigError
from dpn_rt.prompts.processor import Processor
from dpn_rt.prompts.tokenizer import Tokenizer
from dpn_rt.settings import EngineOptions
from tests.builders.checkpoints import TOWER, OriginalCheckpoint, write_tower
from tests.builders.test_huggingface_layout import edit_config, save_model
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


TEMPLATE = "{% for message in messages %}[{{ message.content }}]{% endfor %}"


def write_template(path: Path, place: str, template: Any) -> None:
    if place == "tokenizer":
        settings = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    else:
        (path / place).write_text(template if place.endswith("jinja") else json.dumps({"chat_template": template}))


@pytest.mark.parametrize("place", ["chat_template.json", "chat_template.jinja", "processor_config.json", "tokenizer"])
@pytest.mark.parametrize("kind", ["text", "list", "mapping", "single"])
def test_chat_template_of_the_hugging_face_layout(tmp_path: Path, place: str, kind: str) -> None:
    save_model(tmp_path / "c")
    make_tokenizer(tmp_path / "c", image=True)
    named = {"tool_use": "tools", "default": TEMPLATE} if kind != "single" else {"chat": TEMPLATE}
    as_list = [{"name": name, "template": text} for name, text in named.items()]
    written = {"text": TEMPLATE, "list": as_list, "mapping": named, "single": as_list}[kind]
    write_template(tmp_path / "c", place, TEMPLATE if place.endswith("jinja") else written)
    engine = build_engine(tmp_path / "c", tmp_path / "e")
    assert engine.model.prompt.template == "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(engine.processor_path, local_files_only=True)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "[x]"
    processor = Processor(engine.processor_path, engine.model)
    assert processor.chat([{"role": "user", "content": "x"}])["prompt"] == "[x]"


def write_additional(path: Path, **templates: str) -> None:
    """As transformers saves named templates."""
    (path / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        (path / "additional_chat_templates" / f"{name}.jinja").write_text(text)


@pytest.mark.parametrize(
    ("additional", "place"),
    [
        ({"default": TEMPLATE, "tool_use": "{{ nothing.at.all }}"}, None),
        ({"chat": TEMPLATE}, None),
        ({"tool_use": "{{ nothing.at.all }}", "rag": "{{ 'rag' }}"}, "chat_template.jinja"),
        ({"tool_use": "{{ nothing.at.all }}", "rag": "{{ 'rag' }}"}, "tokenizer"),
        ({"default": "{{ nothing.at.all }}"}, "chat_template.jinja"),
    ],
)
def test_additional_chat_templates(tmp_path: Path, additional: dict[str, str], place: str | None) -> None:
    save_model(tmp_path / "c")
    make_tokenizer(tmp_path / "c", image=True)
    write_additional(tmp_path / "c", **additional)
    if place is not None:
        write_template(tmp_path / "c", place, TEMPLATE)
    engine = build_engine(tmp_path / "c", tmp_path / "e")
    assert engine.model.prompt.template == "tokenizer"
    of_transformers = AutoTokenizer.from_pretrained(tmp_path / "c", local_files_only=True)
    name = "chat" if "chat" in additional else None  # transformers wants the name of one that is no default
    messages = [{"role": "user", "content": "x"}]
    # Beside these files transformers' tokenizers forget the default of tokenizer_config.json, and take an additional
    # default before chat_template.jinja, which its processors take first.
    if place != "tokenizer" and not (place and "default" in additional):
        assert of_transformers.apply_chat_template(messages, chat_template=name, tokenize=False) == "[x]"
    assert Processor(engine.processor_path, engine.model).chat(messages)["prompt"] == "[x]"


def test_additional_chat_templates_without_a_default(tmp_path: Path) -> None:
    save_model(tmp_path / "c")
    make_tokenizer(tmp_path / "c", image=True)
    write_additional(tmp_path / "c", tool_use=TEMPLATE, rag=TEMPLATE)
    with pytest.raises(
        CheckpointError, match=r"additional_chat_templates: .*\['rag', 'tool_use'\], expected 'default'"
    ):
        build_engine(tmp_path / "c", tmp_path / "e")


def test_additional_chat_templates_that_are_no_directory(tmp_path: Path) -> None:
    save_model(tmp_path / "c")
    make_tokenizer(tmp_path / "c", image=True)
    (tmp_path / "c" / "additional_chat_templates").write_text(TEMPLATE)
    with pytest.raises(CheckpointError, match="additional_chat_templates: expected a directory of templates"):
        build_engine(tmp_path / "c", tmp_path / "e")


@pytest.mark.parametrize("has_template", [False, True])
def test_a_note_says_that_conversations_are_written_as_vicunas(tmp_path: Path, has_template: bool) -> None:
    save_model(tmp_path / "c")
    make_tokenizer(tmp_path / "c", image=True)
    if has_template:
        write_template(tmp_path / "c", "chat_template.jinja", TEMPLATE)
    notes: list[str] = []
    engine = build_engine(tmp_path / "c", tmp_path / "e", note=notes.append)
    assert engine.model.prompt.template == ("tokenizer" if has_template else "vicuna_v1")
    assert any("no chat template: conversations are written as Vicuna's" in note for note in notes) != has_template


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (
            [{"name": "a", "template": TEMPLATE}, {"name": "b", "template": TEMPLATE}],
            r"\['a', 'b'\], expected 'default'",
        ),
        (3, "chat_template is 3, expected a text"),
        ([], "expected a text"),
        ({"default": 4}, "expected a text"),
        ("{{ 'Hello' }}", "leaves out what messages say"),
        ("{% for message in messages %}", "its line 1 is no valid Jinja"),
        ("{{ raise_exception('no') }}", "chat template: no"),
        (TEMPLATE.replace("content", "content.split('\n')[-1]"), "writes 0 placeholders for one image"),
        (2 * TEMPLATE, "writes a message 2 times, expected once"),
    ],
)
def test_templates_that_no_request_could_use(tmp_path: Path, template: Any, named: str) -> None:
    save_model(tmp_path / "c")
    make_tokenizer(tmp_path / "c", image=True)
    write_template(tmp_path / "c", "tokenizer", template)
    with pytest.raises(CheckpointError, match=named):
        build_engine(tmp_path / "c", tmp_path / "e")


@pytest.mark.parametrize(
    "content",
    [
        "message.content | upper",
        "message.content | lower",
        "message.content.replace('<image>', '')",
    ],
)
def test_images_of_templates_that_change_letters(tmp_path: Path, content: str) -> None:
    """The build accepts the template, and so does a conversation with an image."""
    save_model(tmp_path / "c")
    make_tokenizer(tmp_path / "c", image=True)
    write_template(tmp_path / "c", "tokenizer", TEMPLATE.replace("message.content", content))
    engine = build_engine(tmp_path / "c", tmp_path / "e")
    processor = Processor(engine.processor_path, engine.model)
    parts = [{"type": "image", "image": Image.new("RGB", (30, 30))}, {"type": "text", "text": "What?"}]
    prompt = processor.chat([{"role": "user", "content": parts}])
    assert prompt["prompt"].startswith("[<image>\n") and prompt["prompt"].lower().count("<image>") == 1
    assert prompt["multi_modal_data"]["image"] is parts[0]["image"]


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


def test_image_processor_is_made_for_the_tower(tmp_path: Path) -> None:
    engine = build_engine(OriginalCheckpoint().fill().write(tmp_path / "c"), tmp_path / "e")
    assert engine.model.prompt.has_image_processor
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8))
    clip = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    loaded = AutoImageProcessor.from_pretrained(engine.processor_path, local_files_only=True)
    ours, theirs = (processor(images=image, return_tensors="np")["pixel_values"] for processor in (loaded, clip))
    assert ours.shape == (1, 3, 28, 28)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("nested", [False, True])
def test_image_processor_of_the_checkpoint_comes_first(tmp_path: Path, nested: bool) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": 28, "width": 28},
        "do_rescale": False,
    }
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (path / name).write_text(json.dumps({"image_processor": settings} if nested else settings))
    engine = build_engine(path, tmp_path / "e")
    assert json.loads((engine.processor_path / "preprocessor_config.json").read_text()) == settings


def test_image_processor_of_the_tower(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.weights = {name: tensor for name, tensor in checkpoint.weights.items() if not name.startswith(TOWER)}
    write_tower(tmp_path / "tower", checkpoint.config["vision_config"])
    settings = {"image_processor_type": "CLIPImageProcessor", "size": 28, "do_center_crop": False}
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(settings))
    engine = build_engine(checkpoint.write(tmp_path / "c"), tmp_path / "e", vision_tower=tmp_path / "tower")
    assert json.loads((engine.processor_path / "preprocessor_config.json").read_text()) == settings


def test_image_processor_for_other_images(tmp_path: Path) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    (path / "preprocessor_config.json").write_text('{"crop_size": {"height": 224, "width": 224}}')
    with pytest.raises(ConfigError, match=r"crop_size is .*224.* takes images of 28 pixels"):
        build_engine(path, tmp_path / "e")


UNTYPED = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28}, "image_mean": [0.1, 0.2, 0.3]}


@pytest.mark.parametrize("settings", [UNTYPED, {**UNTYPED, "image_processor_type": None}])
@pytest.mark.parametrize("place", ["preprocessor_config.json", "processor_config.json", "tower"])
def test_image_processor_without_a_type(tmp_path: Path, place: str, settings: dict[str, Any]) -> None:
    """LLaVA's own code makes CLIP's of it."""
    checkpoint = OriginalCheckpoint().fill()
    tower = None
    if place == "tower":
        checkpoint.weights = {name: tensor for name, tensor in checkpoint.weights.items() if not name.startswith(TOWER)}
        write_tower(tower := tmp_path / "tower", checkpoint.config["vision_config"])
        (tower / "preprocessor_config.json").write_text(json.dumps(settings))
    path = checkpoint.write(tmp_path / "c")
    if tower is None:
        nested = {"image_processor": settings} if place == "processor_config.json" else settings
        (path / place).write_text(json.dumps(nested))
    engine = build_engine(path, tmp_path / "e", vision_tower=tower)
    written = json.loads((engine.processor_path / "preprocessor_config.json").read_text())
    assert written == {**settings, "image_processor_type": "CLIPImageProcessor"}
    loaded = load_processor(tmp_path / "e", "cpu", EngineOptions())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    clip = CLIPImageProcessor(**UNTYPED)(images=image, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(loaded.image(image).views[0].numpy(), clip[0])


def test_image_processor_that_transformers_finds_by_config_json(tmp_path: Path) -> None:
    save_model(tmp_path / "c")
    edit_config(tmp_path / "c")
    side = json.loads((tmp_path / "c" / "config.json").read_text())["vision_config"]["image_size"]
    settings = {"crop_size": {"height": side, "width": side}, "size": {"shortest_edge": side}}
    (tmp_path / "c" / "preprocessor_config.json").write_text(json.dumps(settings))
    engine = build_engine(tmp_path / "c", tmp_path / "e")
    of_transformers = AutoImageProcessor.from_pretrained(tmp_path / "c", local_files_only=True)
    written = json.loads((engine.processor_path / "preprocessor_config.json").read_text())
    assert written["image_processor_type"] == of_transformers.to_dict()["image_processor_type"]
    load_processor(tmp_path / "e", "cpu", EngineOptions())


def test_image_processor_of_an_older_feature_extractor(tmp_path: Path) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    settings = {**UNTYPED, "feature_extractor_type": "CLIPFeatureExtractor"}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    build_engine(path, tmp_path / "e")
    load_processor(tmp_path / "e", "cpu", EngineOptions())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_processor_type": "NoSuchProcessor"}, "has image_processor_type='NoSuchProcessor', expected one that"),
        ({"image_processor_type": 3}, "has image_processor_type=3, expected one that"),
        (
            {"size": "large", "do_resize": True},
            "preprocessor_config.json: size is 'large', expected whole numbers from 1 to",
        ),
        ({"image_mean": [0.5]}, "the image processor fails on a picture"),
        ({"resample": 99}, "preprocessor_config.json: resample is 99, expected one of Pillow's filters, 0 to 5"),
        ({"do_resize": False, "do_center_crop": False}, "gave pixel values .*, the vision tower takes"),
    ],
)
def test_image_processor_that_would_not_work_is_refused_by_the_build(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    settings = {"image_processor_type": "CLIPImageProcessor", **UNTYPED, **changes}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=f"^{path}: an engine with these files would not work: .*{message}"):
        build_engine(path, tmp_path / "e")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c"]


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
