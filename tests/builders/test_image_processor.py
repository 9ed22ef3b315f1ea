"""The image processor files of an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessor

from dpn_rt.builders.native import build_engine
from dpn_rt.engine.loader import load_processor
from dpn_rt.errors import CheckpointError, ConfigError
from dpn_rt.settings import EngineOptions
from tests.builders.checkpoints import TOWER, OriginalCheckpoint, write_tower
from tests.builders.huggingface_checkpoint import edit_config, save_model


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


def test_of_two_image_processors_the_one_that_transformers_takes_counts(tmp_path: Path) -> None:
    """A checkpoint that transformers 5 saved over one of transformers 4 has both files."""
    path = OriginalCheckpoint().fill().write(tmp_path / "c")
    older = {"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 28, "width": 28}}
    newer = {**older, "size": {"shortest_edge": 28}, "image_mean": [0.1, 0.2, 0.3]}
    (path / "preprocessor_config.json").write_text(json.dumps(older))
    (path / "processor_config.json").write_text(json.dumps({"image_processor": newer}))
    engine = build_engine(path, tmp_path / "e")
    assert json.loads((engine.processor_path / "preprocessor_config.json").read_text()) == newer
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8))
    ours, theirs = (
        AutoImageProcessor.from_pretrained(directory, local_files_only=True)(images=image, return_tensors="np")
        for directory in (engine.processor_path, path)
    )
    np.testing.assert_array_equal(ours["pixel_values"], theirs["pixel_values"])


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


def test_an_image_processor_for_square_pictures_alone_is_refused_by_the_build(tmp_path: Path) -> None:
    checkpoint = OriginalCheckpoint().fill()
    checkpoint.config["image_aspect_ratio"] = "square"  # as pictures of other shapes are padded otherwise
    path = checkpoint.write(tmp_path / "c")
    settings = {"image_processor_type": "CLIPImageProcessor", **UNTYPED, "do_center_crop": False}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="would not work: .*gave pixel values .*, the vision tower takes"):
        build_engine(path, tmp_path / "e")
