"""Tokenizer and image processor files: what an engine carries, and what the builder learns from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPImageProcessor

from dpn_rt.builders.native import build_engine
from dpn_rt.errors import CheckpointError, ConfigError
from tests.builders.checkpoints import TOWER, OriginalCheckpoint, write_tower
from tests.builders.test_huggingface_layout import edit_config, save_model
from tests.tiny_tokenizer import TinyTokenizer, make_tokenizer


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
    with pytest.raises(CheckpointError, match="the tokenizer files cannot be loaded: "):
        build_engine(tmp_path / "c", tmp_path / "e")


def test_tokenizer_without_a_class(tmp_path: Path) -> None:
    _, tokenizer = checkpoint_with_tokenizer(tmp_path / "c")
    settings = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (tmp_path / "c" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert build_engine(tmp_path / "c", tmp_path / "e").model.prompt.router_token_id == tokenizer.router_id


def test_end_ids_come_from_generation_config_first(tmp_path: Path) -> None:
    checkpoint, tokenizer = checkpoint_with_tokenizer(tmp_path / "c")
    for key in ("bos_token_id", "eos_token_id"):
        del checkpoint.config[key]
    checkpoint.write(tmp_path / "c")
    prompt = build_engine(tmp_path / "c", tmp_path / "a").model.prompt
    assert (prompt.bos_token_id, prompt.eos_token_ids) == (tokenizer.bos_id, (tokenizer.eos_id,))
    (tmp_path / "c" / "generation_config.json").write_text('{"eos_token_id": [5, 6, 5], "bos_token_id": 4}')
    prompt = build_engine(tmp_path / "c", tmp_path / "b").model.prompt
    assert (prompt.bos_token_id, prompt.eos_token_ids) == (4, (5, 6))


@pytest.mark.parametrize("place", ["chat_template.json", "chat_template.jinja", "processor_config.json", "tokenizer"])
def test_chat_template_of_the_hugging_face_layout(tmp_path: Path, place: str) -> None:
    save_model(tmp_path / "c")
    make_tokenizer(tmp_path / "c", image=True)
    template = "{{ 'Hello' }}"
    if place == "tokenizer":
        settings = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())
        (tmp_path / "c" / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    else:
        text = template if place.endswith("jinja") else json.dumps({"chat_template": template})
        (tmp_path / "c" / place).write_text(text)
    engine = build_engine(tmp_path / "c", tmp_path / "e")
    assert engine.model.prompt.template == "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(engine.processor_path, local_files_only=True)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "Hello"


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


def test_nothing_else_is_carried(tmp_path: Path) -> None:
    checkpoint_with_tokenizer(tmp_path / "c")
    (tmp_path / "c" / "tokenization_custom.py").write_text("raise SystemExit")
    (tmp_path / "c" / "training_args.bin").write_bytes(b"x")
    engine = build_engine(tmp_path / "c", tmp_path / "e")
    carried = sorted(file.name for file in engine.processor_path.iterdir())
    assert carried == ["preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]
