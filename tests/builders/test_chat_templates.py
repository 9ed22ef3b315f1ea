"""The chat template of an engine: where checkpoints have it, and which ones no request could use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer

from dpn_rt.builders.native import build_engine
from dpn_rt.errors import CheckpointError
from dpn_rt.prompts.processor import Processor
from tests.builders.huggingface_checkpoint import save_model
from tests.tiny_tokenizer import make_tokenizer

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
